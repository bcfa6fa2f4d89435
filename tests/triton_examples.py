"""What Triton's example programs do, call by call, with Triton's own Python client and its generated stubs.

`python triton_examples.py HOST:PORT` reads one name of EXAMPLES a line, and answers each with a JSON object on a line.
The models are those of test_serve_triton.py. Each function is named for the program that it follows; what it returns is
judged by the test.
"""

import asyncio
import json
import os
import queue
import sys
import traceback
from contextlib import contextmanager
from functools import partial

import grpc
import numpy as np
import tritonclient.grpc as triton
import tritonclient.grpc.aio as triton_aio
from tritonclient import utils
from tritonclient.grpc import service_pb2, service_pb2_grpc
from tritonclient.utils import InferenceServerException
from tritonclient.utils import shared_memory as shm

WAIT_S = 30.0
NUMBERS = np.arange(16, dtype=np.int32)[None]
ONES = np.ones((1, 16), np.int32)
CHANNEL = [
    ("grpc.max_send_message_length", 1024 * 1024),
    ("grpc.max_receive_message_length", 1024 * 1024),
    ("grpc.keepalive_time_ms", 2**31 - 1),
    ("grpc.keepalive_timeout_ms", 20000),
    ("grpc.keepalive_permit_without_calls", False),
    ("grpc.http2.max_pings_without_data", 2),
    ("grpc.dns_enable_srv_queries", 1),
]


def tensor(name, array):
    sent = triton.InferInput(name, list(array.shape), utils.np_to_triton_dtype(array.dtype))
    sent.set_data_from_numpy(array)
    return sent


def texts(array):
    return np.array([str(number).encode() for number in array.ravel()], object).reshape(array.shape)


def add_sub(convert=lambda array: array):
    return [tensor("INPUT0", convert(NUMBERS)), tensor("INPUT1", convert(ONES))]


def both():
    return [triton.InferRequestedOutput("OUTPUT0"), triton.InferRequestedOutput("OUTPUT1")]


def arrays(result):
    return [[int(x) for x in result.as_numpy(name).ravel()] for name in ("OUTPUT0", "OUTPUT1")]


def refused(call):
    """The status and the message of a call that is to fail."""
    try:
        answer = call()
    except InferenceServerException as error:
        return {"status": error.status(), "message": error.message()}
    return {"status": "OK", "message": repr(answer)}


def infer(url):
    client = triton.InferenceServerClient(url)
    asked = [
        client.infer("simple", add_sub(), outputs=both(), client_timeout=WAIT_S, headers={"test": "1"}),
        client.infer("simple", add_sub(), outputs=None, compression_algorithm="gzip"),
        client.infer("simple", add_sub(), model_version="1", request_id="7", compression_algorithm="deflate"),
        client.infer("simple", add_sub(), priority=1, timeout=60_000_000, parameters={"mine": 3, "too": "yes"}),
    ]
    before, after = (client.get_inference_statistics("simple").model_stats for _ in range(2))
    return {
        "arrays": [arrays(each) for each in asked],
        "id": asked[2].get_response().id,
        "version": asked[0].get_response().model_version,
        "statistics": [len(before), len(after), int(after[0].version), after[0].inference_stats.queue.count],
    }


def one_output(url):
    client = triton.InferenceServerClient(url)
    result = client.infer("simple", add_sub(), outputs=[triton.InferRequestedOutput("OUTPUT1")])
    return {"names": [o.name for o in result.get_response().outputs], "minus": result.as_numpy("OUTPUT1").tolist()}


def async_infer(url):
    client, answers = triton.InferenceServerClient(url), queue.Queue()
    for _ in range(10):
        client.async_infer("simple", add_sub(), lambda result, error: answers.put((result, error)), outputs=both())
    got = [answers.get(timeout=WAIT_S) for _ in range(10)]
    client.async_infer("missing", add_sub(), lambda result, error: answers.put((result, error)))
    result, error = answers.get(timeout=WAIT_S)
    return {"arrays": [arrays(each) for each, _ in got], "error": error.status(), "result": result}


def cancel(url):
    client, answers = triton.InferenceServerClient(url), queue.Queue()
    sent = [tensor("n", np.array(200_000, np.int64))]
    call = client.async_infer("slow", sent, lambda result, error: answers.put(error))
    call.cancel()
    return {"status": answers.get(timeout=WAIT_S).status()}


def client_timeout(url):
    client = triton.InferenceServerClient(url)
    return refused(lambda: client.infer("slow", [tensor("n", np.array(200_000, np.int64))], client_timeout=0.001))


def string(url):
    client = triton.InferenceServerClient(url)
    sums = client.infer("simple_string", add_sub(texts), outputs=both())
    nul = np.array([[b"he\x00llo"] * 16], object)
    blobs = np.array([[b"\x00\x01\x02\x03"] * 16], np.bytes_)
    same = [client.infer("simple_identity", [tensor("INPUT0", each)]).as_numpy("OUTPUT0") for each in (nul, blobs)]
    return {"arrays": arrays(sums), "nul": bool((same[0] == nul).all()), "blobs": same[1].tolist() == blobs.tolist()}


@contextmanager
def regions(client, sizes):
    """Objects of these sizes, created and registered by name; nothing is left behind."""
    client.unregister_system_shared_memory()
    client.unregister_cuda_shared_memory()
    handles = {}
    try:
        for name, size in sizes.items():
            key = f"/edgeward-{os.getpid()}-{name}"
            handles[name] = shm.create_shared_memory_region(name, key, size)
            client.register_system_shared_memory(name, key, size)
        yield handles
    finally:
        client.unregister_system_shared_memory()
        for handle in handles.values():
            shm.destroy_shared_memory_region(handle)


def in_region(name, shape, datatype, region, size, offset=0):
    sent = triton.InferInput(name, shape, datatype)
    sent.set_shared_memory(region, size, offset=offset)
    return sent


def into_region(name, region, size, offset=0):
    wanted = triton.InferRequestedOutput(name)
    wanted.set_shared_memory(region, size, offset=offset)
    return wanted


def found(handle, result, name, offset=0):
    output = result.get_output(name)
    kind = utils.triton_to_np_dtype(output.datatype)
    return [int(x) for x in shm.get_contents_as_numpy(handle, kind, output.shape, offset=offset).ravel()]


def shared_memory(url):
    client = triton.InferenceServerClient(url)
    with regions(client, {"input_data": 128, "output_data": 128}) as handles:
        shm.set_shared_memory_region(handles["input_data"], [NUMBERS[0]])
        shm.set_shared_memory_region(handles["input_data"], [ONES[0]], offset=64)
        inputs = [in_region(f"INPUT{i}", [1, 16], "INT32", "input_data", 64, 64 * i) for i in (0, 1)]
        outputs = [into_region(f"OUTPUT{i}", "output_data", 64, 64 * i) for i in (0, 1)]
        result = client.infer("simple", inputs, outputs=outputs)
        status = client.get_system_shared_memory_status().regions
        return {
            "arrays": [found(handles["output_data"], result, f"OUTPUT{i}", 64 * i) for i in (0, 1)],
            "raw": [len(raw) for raw in result.get_response().raw_output_contents],
            "status": {name: [each.offset, each.byte_size] for name, each in status.items()},
            "again": refused(lambda: client.register_system_shared_memory("input_data", "/any", 128))["status"],
            "unknown": refused(lambda: client.infer("simple", add_sub(), outputs=[into_region("OUTPUT0", "no", 64)])),
            "cuda": dict(client.get_cuda_shared_memory_status().regions),
        }


def shared_memory_string(url):
    client = triton.InferenceServerClient(url)
    sent = [utils.serialize_byte_tensor(texts(each)).item() for each in (NUMBERS, ONES)]
    sizes = {"in0": len(sent[0]), "in1": len(sent[1]), "out0": 200, "out1": 200}
    with regions(client, sizes) as handles:
        for name, data in zip(("in0", "in1"), sent, strict=True):
            shm.set_shared_memory_region(handles[name], [np.frombuffer(data, np.uint8)])
        inputs = [in_region(f"INPUT{i}", [1, 16], "BYTES", f"in{i}", len(sent[i])) for i in (0, 1)]
        outputs = [into_region(f"OUTPUT{i}", f"out{i}", 200) for i in (0, 1)]
        result = client.infer("simple_string", inputs, outputs=outputs)
        sizes = [o.parameters["shared_memory_byte_size"].int64_param for o in result.get_response().outputs]
        got = [found(handles[f"out{i}"], result, f"OUTPUT{i}") for i in (0, 1)]
        return {"arrays": got, "sizes": sizes}


def reuse_infer_objects(url):
    """The same input and output objects with shared memory, without, and with it again."""
    client, got = triton.InferenceServerClient(url), []
    with regions(client, {"in0": 64, "in1": 64, "out0": 64, "out1": 64}) as handles:
        shm.set_shared_memory_region(handles["in0"], [NUMBERS])
        shm.set_shared_memory_region(handles["in1"], [ONES])
        inputs, outputs = add_sub(), both()
        for shared in (True, False, True):
            for i in (0, 1):
                if shared:
                    inputs[i].set_shared_memory(f"in{i}", 64)
                    outputs[i].set_shared_memory(f"out{i}", 64)
                else:
                    inputs[i].set_data_from_numpy((NUMBERS, 2 * ONES)[i])
                    outputs[i].unset_shared_memory()
            result = client.infer("simple", inputs, outputs=outputs)
            in_memory = [found(handles[f"out{i}"], result, f"OUTPUT{i}") for i in (0, 1)]
            got.append(in_memory if shared else arrays(result))
    return {"arrays": got}


def cuda_shared_memory(url):
    client = triton.InferenceServerClient(url)
    client.unregister_cuda_shared_memory()
    return {
        "register": refused(lambda: client.register_cuda_shared_memory("region", b"aGFuZGxl", 0, 64)),
        "status": dict(client.get_cuda_shared_memory_status().regions),
        "extensions": list(client.get_server_metadata().extensions),
    }


def switched_off(url):
    """What a server answers that was started without --admin and --shared-memory."""
    client = triton.InferenceServerClient(url)
    shared = [in_region("INPUT0", [1, 16], "INT32", "input_data", 64), tensor("INPUT1", ONES)]
    return {
        "register": refused(lambda: client.register_system_shared_memory("input_data", "/any", 64)),
        "unregister": refused(client.unregister_system_shared_memory),
        "cuda": refused(client.unregister_cuda_shared_memory),
        "infer": refused(lambda: client.infer("simple", shared)),
        "load": refused(lambda: client.load_model("simple")),
        "unload": refused(lambda: client.unload_model("simple")),
        "log": refused(lambda: client.update_log_settings({"log_verbose_level": 1})),
        "trace": refused(lambda: client.get_trace_settings("simple")),
        "status": dict(client.get_system_shared_memory_status().regions),
        "extensions": list(client.get_server_metadata().extensions),
        "arrays": arrays(client.infer("simple", add_sub())),
    }


def health_metadata(url):
    client = triton.InferenceServerClient(url)
    return {
        "live": client.is_server_live(headers={"test": "1", "dummy": "2"}),
        "ready": client.is_server_ready(),
        "model": client.is_model_ready("simple"),
        "version": client.is_model_ready("simple", "1"),
        "server": client.get_server_metadata(as_json=True),
        "metadata": client.get_model_metadata("simple", headers={"test": "1", "dummy": "2"}, as_json=True),
        "wrong": refused(lambda: client.get_model_metadata("wrong_model_name")),
        "config": client.get_model_config("simple", as_json=True)["config"],
        "statistics": sorted({each.name for each in client.get_inference_statistics().model_stats}),
        "log": client.get_log_settings(as_json=True),
    }


def model_control(url):
    client = triton.InferenceServerClient(url)

    def states():
        index = client.get_model_repository_index().models
        return {each.name: [each.version, each.state, each.reason] for each in index}

    before = states()
    client.unload_model("simple_int8")
    unloaded = [client.is_model_ready("simple_int8"), states()["simple_int8"]]
    inference = refused(lambda: client.infer("simple_int8", add_sub(lambda array: array.astype(np.int8))))
    client.load_model("simple_int8")
    files = {"file:" + "A" * 256: b"a"}
    return {
        "before": before,
        "unloaded": unloaded,
        "inference": inference,
        "loaded": [client.is_model_ready("simple_int8"), states() == before],
        "arrays": arrays(client.infer("simple_int8", add_sub(lambda array: array.astype(np.int8)))),
        "broken": refused(lambda: client.load_model("simple", config='"parameters": {"config": {{"max": "16"}}}')),
        "config": refused(lambda: client.load_model("simple", config='{"max_batch_size":"16"}')),
        "files": refused(lambda: client.load_model("simple", config="{}", files=files)),
        "wrong": refused(lambda: client.load_model("wrong_model_name")),
        "outside": refused(lambda: client.load_model("../simple")),
        "after": [client.is_server_live(), client.is_model_ready("simple"), states() == before],
    }


def sequence(url):
    client = triton.InferenceServerClient(url)
    return refused(lambda: client.infer("simple", add_sub(), sequence_id=1000, sequence_start=True))


def sequence_stream(url):
    """Requests of a sequence are refused one by one; the stream goes on, with the others' answers in their order."""
    answers = queue.Queue()
    with triton.InferenceServerClient(url) as client:
        client.start_stream(partial(lambda result, error: answers.put((result, error))), stream_timeout=WAIT_S)
        for number in range(6):
            sequence_id = "name" if number % 3 == 2 else 0
            client.async_stream_infer("simple", add_sub(), request_id=str(number), sequence_id=sequence_id)
        got = [answers.get(timeout=WAIT_S) for _ in range(6)]
    return {"ids": [r.get_response().id if r else None for r, _ in got], "errors": [str(e) for _, e in got if e]}


def stream(url):
    """Fifty requests at once, an unknown model among them, and empty final responses where they are asked for."""
    answers = queue.Queue()
    with triton.InferenceServerClient(url) as client:
        client.start_stream(lambda result, error: answers.put((result, error)), compression_algorithm="gzip")
        for number in range(50):
            inputs = [tensor("INPUT0", NUMBERS + number), tensor("INPUT1", ONES)]
            model = "missing" if number == 20 else "simple"
            final = number == 49
            client.async_stream_infer(
                model, inputs, outputs=both(), request_id=str(number), enable_empty_final_response=final
            )
        got = [answers.get(timeout=WAIT_S) for _ in range(50)]
        client.stop_stream()
    last = got[-1][0].get_response().parameters
    return {
        "ids": [int(r.get_response().id) for r, _ in got if r],
        "sums": [int(r.as_numpy("OUTPUT0")[0, 0]) for r, _ in got if r],
        "errors": [str(error) for _, error in got if error],
        "at": [number for number, (_, error) in enumerate(got) if error],
        "final": last["triton_final_response"].bool_param,
        "outputs": len(got[-1][0].get_response().outputs),
    }


def custom_args(url):
    return {"arrays": arrays(triton.InferenceServerClient(url, channel_args=CHANNEL).infer("simple", add_sub()))}


def keepalive(url):
    options = triton.KeepAliveOptions(
        keepalive_time_ms=2**31 - 1, keepalive_timeout_ms=20000, keepalive_permit_without_calls=False,
        http2_max_pings_without_data=2,
    )  # fmt: skip
    return {"arrays": arrays(triton.InferenceServerClient(url, keepalive_options=options).infer("simple", add_sub()))}


def explicit(url, model, datatype, field, convert):
    with grpc.insecure_channel(url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = service_pb2.ModelInferRequest(model_name=model)
        for name, array in (("INPUT0", NUMBERS), ("INPUT1", ONES)):
            sent = request.inputs.add(name=name, datatype=datatype, shape=[1, 16])
            getattr(sent.contents, field).extend(convert(int(x)) for x in array.ravel())
        for name in ("OUTPUT0", "OUTPUT1"):
            request.outputs.add(name=name)
        response = stub.ModelInfer(request)
        request.model_version = "wrong_specification"
        try:
            stub.ModelInfer(request)
            wrong = None
        except grpc.RpcError as error:
            wrong = [error.code().name, error.details()]
    return response, wrong


def explicit_byte_content(url):
    response, _ = explicit(url, "simple_string", "BYTES", "bytes_contents", lambda number: str(number).encode())
    raw = [utils.deserialize_bytes_tensor(each) for each in response.raw_output_contents]
    return {"arrays": [[int(x) for x in each] for each in raw]}


def explicit_int_content(url):
    response, wrong = explicit(url, "simple", "INT32", "int_contents", int)
    return {"arrays": [np.frombuffer(each, np.int32).tolist() for each in response.raw_output_contents], "wrong": wrong}


def explicit_int8_content(url):
    response, wrong = explicit(url, "simple_int8", "INT8", "int_contents", int)
    return {"arrays": [np.frombuffer(each, np.int8).tolist() for each in response.raw_output_contents], "wrong": wrong}


def generated_stubs(url):
    with grpc.insecure_channel(url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        request = service_pb2.ModelInferRequest(model_name="classifier", id="my request id")
        request.inputs.add(name="INPUT", datatype="FP32", shape=[1, 3, 2, 2])
        request.outputs.add(name="OUTPUT")
        request.raw_input_contents.append(b"aaaa" * 12)
        response = stub.ModelInfer(request)
        return {
            "live": stub.ServerLive(service_pb2.ServerLiveRequest()).live,
            "ready": stub.ServerReady(service_pb2.ServerReadyRequest()).ready,
            "model": stub.ModelReady(service_pb2.ModelReadyRequest(name="classifier", version="")).ready,
            "metadata": stub.ModelMetadata(service_pb2.ModelMetadataRequest(name="classifier")).inputs[0].shape[:],
            "id": response.id,
            "shape": response.outputs[0].shape[:],
            "bytes": len(response.raw_output_contents[0]),
        }


def image(url):
    """Classification by the two highest scores, with labels: one image, two, and two on a stream."""
    with grpc.insecure_channel(url) as channel:
        stub = service_pb2_grpc.GRPCInferenceServiceStub(channel)
        config = stub.ModelConfig(service_pb2.ModelConfigRequest(name="classifier")).config
        answers = {"format": config.input[0].format, "dims": config.input[0].dims[:], "most": config.max_batch_size}
        colours = np.zeros((2, 3, 2, 2), np.float32)
        colours[0, 1], colours[0, 2], colours[1, 0] = 2, 1, 5
        for batch in (1, 2):
            request = service_pb2.ModelInferRequest(model_name="classifier")
            request.inputs.add(name="INPUT", datatype="FP32", shape=[batch, 3, 2, 2])
            request.outputs.add(name="OUTPUT").parameters["classification"].int64_param = 2
            request.raw_input_contents.append(colours[:batch].tobytes())
            response = stub.ModelInfer(request)
            answers[f"batch {batch}"] = classes(response)
        streamed = stub.ModelStreamInfer(iter([request, request]), timeout=WAIT_S)
        answers["stream"] = [[each.error_message, classes(each.infer_response)] for each in streamed]
    client = triton.InferenceServerClient(url)
    wanted = [triton.InferRequestedOutput("OUTPUT", class_count=1)]
    result = client.infer("classifier", [tensor("INPUT", colours)], outputs=wanted)
    return {**answers, "client": [x.decode() for x in result.as_numpy("OUTPUT").ravel()]}


def classes(response):
    found = utils.deserialize_bytes_tensor(response.raw_output_contents[0])
    return [response.outputs[0].datatype, response.outputs[0].shape[:], [each.decode() for each in found]]


async def aio_infer(url):
    async with triton_aio.InferenceServerClient(url) as client:
        asked = [client.infer("simple", add_sub(), outputs=both(), client_timeout=WAIT_S) for _ in range(10)]
        got = await asyncio.gather(*asked)
        strings = await client.infer("simple_string", add_sub(texts), compression_algorithm="gzip")
        statistics = await client.get_inference_statistics("simple")
    async with triton_aio.InferenceServerClient(url, channel_args=CHANNEL) as client:
        got.append(await client.infer("simple", add_sub()))
    async with triton_aio.InferenceServerClient(url, keepalive_options=triton_aio.KeepAliveOptions()) as client:
        got.append(await client.infer("simple", add_sub()))
    return {"arrays": [arrays(each) for each in [*got, strings]], "statistics": len(statistics.model_stats)}


async def aio_health_metadata(url):
    async with triton_aio.InferenceServerClient(url) as client:
        try:
            await client.get_model_metadata("wrong_model_name")
            wrong = None
        except InferenceServerException as error:
            wrong = error.message()
        return {
            "live": await client.is_server_live(),
            "ready": await client.is_server_ready(),
            "model": await client.is_model_ready("simple"),
            "server": (await client.get_server_metadata()).name,
            "metadata": (await client.get_model_metadata("simple")).name,
            "config": (await client.get_model_config("simple")).config.name,
            "wrong": wrong,
        }


async def aio_model_control(url):
    async with triton_aio.InferenceServerClient(url) as client:
        await client.unload_model("simple_int8")
        unloaded = await client.is_model_ready("simple_int8")
        await client.load_model("simple_int8")
        try:
            await client.load_model("wrong_model_name")
            wrong = None
        except InferenceServerException as error:
            wrong = error.message()
        loaded = await client.is_model_ready("simple_int8")
        index = await client.get_model_repository_index()
    return {"unloaded": unloaded, "loaded": loaded, "wrong": wrong, "models": len(index.models)}


async def aio_stream(url):
    async def requests():
        for number in range(20):
            inputs = [tensor("INPUT0", NUMBERS + number), tensor("INPUT1", ONES)]
            yield {"model_name": "simple", "inputs": inputs, "outputs": both(), "request_id": str(number)}
        yield {"model_name": "simple", "inputs": add_sub(), "request_id": "20", "sequence_id": 1000}

    async with triton_aio.InferenceServerClient(url) as client:
        got = [each async for each in client.stream_infer(requests(), stream_timeout=WAIT_S)]
    return {
        "ids": [int(result.get_response().id) for result, error in got if not error],
        "sums": [int(result.as_numpy("OUTPUT0")[0, 0]) for result, error in got if not error],
        "errors": [str(error) for _, error in got if error],
    }


async def aio_shared_memory(url):
    keys = {name: f"/edgeward-{os.getpid()}-aio-{name}" for name in ("in", "out")}
    handles = {name: shm.create_shared_memory_region(name, key, 128) for name, key in keys.items()}
    try:
        async with triton_aio.InferenceServerClient(url) as client:
            await client.unregister_system_shared_memory()
            await client.unregister_cuda_shared_memory()
            for name, key in keys.items():
                await client.register_system_shared_memory(name, key, 128)
            shm.set_shared_memory_region(handles["in"], [NUMBERS, ONES])
            inputs = [in_region(f"INPUT{i}", [1, 16], "INT32", "in", 64, 64 * i) for i in (0, 1)]
            outputs = [into_region(f"OUTPUT{i}", "out", 64, 64 * i) for i in (0, 1)]
            result = await client.infer("simple", inputs, outputs=outputs)
            status = await client.get_system_shared_memory_status()
            await client.unregister_system_shared_memory()
        got = [found(handles["out"], result, f"OUTPUT{i}", 64 * i) for i in (0, 1)]
        return {"arrays": got, "status": sorted(status.regions)}
    finally:
        for handle in handles.values():
            shm.destroy_shared_memory_region(handle)


EXAMPLES = {
    each.__name__: each
    for each in (
        infer, one_output, async_infer, cancel, client_timeout, string, shared_memory, shared_memory_string,
        reuse_infer_objects, cuda_shared_memory, switched_off, health_metadata, model_control, sequence,
        sequence_stream, stream, custom_args, keepalive, explicit_byte_content, explicit_int_content,
        explicit_int8_content, generated_stubs, image, aio_infer, aio_health_metadata, aio_model_control,
        aio_stream, aio_shared_memory,
    )
}  # fmt: skip


def main():
    url = sys.argv[1]
    for line in sys.stdin:
        try:
            answer = EXAMPLES[line.strip()](url)
            answer = asyncio.run(answer) if asyncio.iscoroutine(answer) else answer
        except Exception:
            answer = {"failed": traceback.format_exc()}
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


if __name__ == "__main__":
    main()
