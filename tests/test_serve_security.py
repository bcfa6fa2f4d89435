"""Who may call: certificates, tokens, and the socket that only its owner can open."""

import contextlib
import gc
import os
import queue
import socket
import subprocess
import tracemalloc
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import numpy as np
import pytest
from grpc_health.v1 import health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection_pb2, reflection_pb2_grpc

from bundle.log import captured
from protos import inference_pb2 as pb
from protos import inference_pb2_grpc as rpc
from serve import wire
from serve.config import ServeConfig
from serve.errors import PermissionDenied, StartError, Unauthenticated
from serve.security import Tokens, credentials, private_socket, warn_exposed
from serve.server import start
from tests.serve_bundles import identity, png, write_image_bundle

CALL = "/inference.GRPCInferenceService/"
READER, ROTATED, ADMIN, STRANGER = ("reader-token-0001", "reader-token-0002", "admin-token-00001", "stranger-token-01")


def openssl(*arguments):
    subprocess.run(["openssl", *map(str, arguments)], check=True, capture_output=True)


def certificate(folder, name, *, signed_by=None, days=1, authority=False):
    """Make NAME.pem and NAME.key in a folder; signed by another name there, or by itself."""
    folder.mkdir(exist_ok=True)
    pem, key, request, extensions = (folder / f"{name}.{end}" for end in ("pem", "key", "csr", "ext"))
    curve = ("-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:P-256")
    openssl("req", "-new", *curve, "-nodes", "-keyout", key, "-out", request, "-subj", f"/CN={name}")
    extensions.write_text(f"subjectAltName=DNS:localhost,IP:127.0.0.1\nbasicConstraints=CA:{str(authority).upper()}\n")
    signer = folder / f"{signed_by or name}"
    issuer = ("-CA", f"{signer}.pem", "-CAkey", f"{signer}.key", "-CAcreateserial") if signed_by else ("-signkey", key)
    openssl("x509", "-req", "-in", request, *issuer, "-days", days, "-extfile", extensions, "-out", pem)
    return pem


@pytest.fixture(scope="module")
def pki(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pki")
    certificate(folder, "authority", authority=True)
    certificate(folder, "server", signed_by="authority")
    certificate(folder, "client", signed_by="authority")
    certificate(folder, "stranger")
    certificate(folder, "expired", signed_by="authority", days=-1)
    certificate(folder, "expired-authority", authority=True, days=-1)
    return folder


def config(**options):
    return ServeConfig(paths=(), **options)


def tls(pki, cert="server", key="server", ca=None):
    return config(tls_cert=pki / f"{cert}.pem", tls_key=pki / f"{key}.key", tls_client_ca=ca and pki / f"{ca}.pem")


class Echo(grpc.GenericRpcHandler):
    def service(self, details):
        return grpc.unary_unary_rpc_method_handler(lambda request, context: request)


@contextlib.contextmanager
def listening(server_credentials):
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Echo()])
    port = server.add_secure_port("127.0.0.1:0", server_credentials)
    server.start()
    try:
        yield f"localhost:{port}"
    finally:
        server.stop(0).wait()


def echo(address, channel_credentials):
    """The answer over a new connection, or the status."""
    options = [("grpc.use_local_subchannel_pool", 1)]
    with grpc.secure_channel(address, channel_credentials, options) as channel:
        try:
            return channel.unary_unary("/x/y")(b"hello", timeout=10)
        except grpc.RpcError as error:
            return error.code()


def trust(pki, name="authority", client=None):
    own = [(pki / f"{client}.{end}").read_bytes() for end in ("key", "pem")] if client else (None, None)
    return grpc.ssl_channel_credentials((pki / f"{name}.pem").read_bytes(), *own)


def test_tls_is_served_to_those_who_trust_its_authority(pki):
    """A client that knows the authority is answered; one that trusts another is not, and none without TLS."""
    with listening(credentials(tls(pki))) as address:
        assert echo(address, trust(pki)) == b"hello"
        assert echo(address, trust(pki, "stranger")) is grpc.StatusCode.UNAVAILABLE
        with grpc.insecure_channel(address) as channel, pytest.raises(grpc.RpcError):
            channel.unary_unary("/x/y")(b"hello", timeout=10)


def test_a_client_authority_asks_every_client_for_a_certificate(pki):
    """With it only clients whose certificate it signed are answered."""
    with listening(credentials(tls(pki, ca="authority"))) as address:
        assert echo(address, trust(pki, client="client")) == b"hello"
        assert echo(address, trust(pki)) is grpc.StatusCode.UNAVAILABLE
        assert echo(address, trust(pki, client="stranger")) is grpc.StatusCode.UNAVAILABLE


def test_a_replaced_certificate_is_served_to_new_connections(pki, tmp_path):
    """Renewal needs no restart: the next connection sees what lies on disk, and a bad file leaves the old one."""
    for end in ("pem", "key"):
        (tmp_path / f"server.{end}").write_bytes((pki / f"server.{end}").read_bytes())
    with listening(credentials(tls(tmp_path))) as address:
        assert echo(address, trust(pki)) == b"hello"

        (tmp_path / "server.pem").write_bytes((pki / "stranger.pem").read_bytes())
        with captured() as logs:
            assert echo(address, trust(pki)) == b"hello"
        assert [line["event"] for line in logs] == ["changed file not used"]

        (tmp_path / "server.key").write_bytes((pki / "stranger.key").read_bytes())
        assert echo(address, trust(pki, "stranger")) == b"hello"
        assert echo(address, trust(pki)) is grpc.StatusCode.UNAVAILABLE


def test_no_tls_is_asked_for(pki):
    """Without a certificate there are no credentials; half of what TLS needs is an error, and TLS on a socket."""
    assert credentials(config()) is None
    with pytest.raises(StartError, match="together"):
        credentials(config(tls_cert=pki / "server.pem"))
    with pytest.raises(StartError, match="together"):
        credentials(config(tls_client_ca=pki / "authority.pem"))
    with pytest.raises(StartError, match="takes no TLS"):
        credentials(config(socket=Path("s"), tls_cert=pki / "server.pem", tls_key=pki / "server.key"))


@pytest.mark.parametrize(
    ("cert", "key", "ca", "named", "says"),
    [
        ("missing", "server", None, "missing.pem", "cannot be read"),
        ("server", "client", None, "client.key", "not the key"),
        ("expired", "expired", None, "expired.pem", "certificate has expired"),
        ("server", "server", "missing", "missing.pem", "cannot be read"),
        ("server", "server", "server", "server.pem", "no certificate of an authority"),
        ("server", "server", "expired-authority", "expired-authority.pem", "expired"),
    ],
)
def test_files_that_cannot_serve_tls_keep_the_server_from_starting(pki, cert, key, ca, named, says):
    """The error names the file and what is wrong with it."""
    with pytest.raises(StartError, match=says) as raised:
        credentials(tls(pki, cert, key, ca))

    assert named in str(raised.value)


def test_what_is_no_pem_is_named(pki, tmp_path):
    """Any other content is an error at the start, for each of the three files."""
    (tmp_path / "text.pem").write_text("no certificate")
    (tmp_path / "text.key").write_text("no key")
    good = {"tls_cert": pki / "server.pem", "tls_key": pki / "server.key"}
    for bad in ({"tls_cert": tmp_path / "text.pem"}, {"tls_key": tmp_path / "text.key"}):
        with pytest.raises(StartError, match="text"):
            credentials(config(**{**good, **bad}))
    with pytest.raises(StartError, match="holds no certificate"):
        credentials(config(**good, tls_client_ca=tmp_path / "text.pem"))


def test_keys_that_the_server_could_not_use_are_refused(pki, tmp_path):
    """An encrypted key, for which nobody is asked, and Ed25519, with which every handshake would fail."""
    openssl("pkey", "-in", pki / "server.key", "-aes128", "-passout", "pass:secret", "-out", tmp_path / "server.key")
    with pytest.raises(StartError, match="encrypted"):
        credentials(config(tls_cert=pki / "server.pem", tls_key=tmp_path / "server.key"))

    pem, key = tmp_path / "ed.pem", tmp_path / "ed.key"
    openssl("req", "-x509", "-newkey", "ed25519", "-nodes", "-subj", "/CN=ed", "-keyout", key, "-out", pem)
    with pytest.raises(StartError, match="Ed25519"):
        credentials(config(tls_cert=pem, tls_key=key))


def private(path, *lines):
    path.write_text("\n".join(lines) + "\n")
    path.chmod(0o600)
    return path


@pytest.fixture
def files(tmp_path):
    return {
        "token_file": private(tmp_path / "tokens", "# since May", READER, "", f"  {ROTATED}  "),
        "admin_token_file": private(tmp_path / "admin", ADMIN),
    }


def outcome(tokens, name, *metadata):
    method = name if name.startswith("/") else CALL + name
    try:
        tokens.check(method, metadata)
    except (Unauthenticated, PermissionDenied) as error:
        return type(error)
    return "allowed"


def bearer(token):
    return ("authorization", f"Bearer {token}")


def test_a_call_needs_a_token_that_is_known(files):
    """Each of several tokens is valid, so that they can be rotated; none and others are not."""
    tokens = Tokens(config(**files))
    for name in ("ModelInfer", "ModelStreamInfer", "ModelMetadata", "RepositoryIndex", "SystemSharedMemoryStatus"):
        assert outcome(tokens, name, bearer(READER)) == "allowed"
        assert outcome(tokens, name, bearer(ROTATED)) == "allowed"
        assert outcome(tokens, name, bearer(ADMIN)) == "allowed"
        assert outcome(tokens, name) is Unauthenticated
        assert outcome(tokens, name, bearer(STRANGER)) is Unauthenticated


@pytest.mark.parametrize(
    "name",
    [
        "RepositoryModelLoad",
        "RepositoryModelUnload",
        "SystemSharedMemoryRegister",
        "SystemSharedMemoryUnregister",
        "CudaSharedMemoryRegister",
        "CudaSharedMemoryUnregister",
        "LogSettings",
        "TraceSetting",
    ],
)
def test_calls_of_administration_need_an_admin_token(files, name):
    """A token for inference is known, but not for these; no token is no token."""
    tokens = Tokens(config(**files, admin=True))

    assert outcome(tokens, name, bearer(ADMIN)) == "allowed"
    assert outcome(tokens, name, bearer(READER)) is PermissionDenied
    assert outcome(tokens, name, bearer(STRANGER)) is Unauthenticated
    assert outcome(tokens, name) is Unauthenticated


def test_refused_calls_are_counted_by_why(files):
    """For the metrics; calls that are allowed are not counted."""
    tokens = Tokens(config(**files, admin=True))
    for name, *metadata in [
        ("ModelInfer",),
        ("ModelInfer", bearer(STRANGER)),
        ("RepositoryModelLoad", bearer(READER)),
        ("RepositoryModelLoad", bearer(ADMIN)),
    ]:
        outcome(tokens, name, *metadata)

    assert tokens.refused == {"unauthenticated": 2, "permission_denied": 1}


def test_probes_need_no_token_and_unknown_calls_do(files):
    """Health and liveness are open, since probes have no token; whatever is not listed as open is not."""
    tokens = Tokens(config(**files))
    for name in ("ServerLive", "ServerReady", "/grpc.health.v1.Health/Check", "/grpc.health.v1.Health/Watch"):
        assert outcome(tokens, name) == "allowed"
    for name in ("/grpc.reflection.v1alpha.ServerReflection/ServerReflectionInfo", "ModelReady", "Added", "/a/b"):
        assert outcome(tokens, name) is Unauthenticated


@pytest.mark.parametrize(
    "metadata",
    [
        [("authorization", READER)],
        [("authorization", f"Basic {READER}")],
        [("authorization", "Bearer ")],
        [("authorization", f"Bearer {READER}x")],
        [("authorization", f"Bearer {READER[:-1]}")],
        [("authorization-bin", READER.encode())],
        [("token", READER)],
        [bearer(READER), bearer(STRANGER)],
    ],
)
def test_a_token_is_taken_from_one_authorization_header_only(files, metadata):
    """Anything but `authorization: Bearer TOKEN`, once, is no token."""
    assert outcome(Tokens(config(**files)), "ModelInfer", *metadata) is Unauthenticated


def test_the_scheme_may_be_written_in_any_case(files):
    """As HTTP has it."""
    assert outcome(Tokens(config(**files)), "ModelInfer", ("authorization", f"bearer {READER}")) == "allowed"


def test_without_files_every_call_is_allowed():
    """Tokens are an option; without them nothing is asked for."""
    assert outcome(Tokens(config(admin=True)), "RepositoryModelLoad") == "allowed"


def test_admin_tokens_alone_leave_inference_open(files):
    """Only what --admin allows is then kept for those who have one."""
    tokens = Tokens(config(admin=True, admin_token_file=files["admin_token_file"]))

    assert outcome(tokens, "ModelInfer") == "allowed"
    assert outcome(tokens, "RepositoryModelLoad") is Unauthenticated
    assert outcome(tokens, "RepositoryModelLoad", bearer(ADMIN)) == "allowed"


@pytest.mark.parametrize("switch", ["admin", "shared_memory"])
def test_tokens_without_admin_tokens_would_leave_administration_to_nobody(files, switch):
    """Or to everybody; the server asks which instead of choosing."""
    with pytest.raises(StartError, match="admin-token-file"):
        Tokens(config(token_file=files["token_file"], **{switch: True}))


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (["# only a comment", ""], "holds no token"),
        ([READER, "short"], "line 2"),
        ([f"{READER} and a remark"], "line 1"),
        (["tökens-of-length-16"], "line 1"),
    ],
)
def test_a_token_file_that_cannot_be_used_keeps_the_server_from_starting(tmp_path, lines, says):
    """The error names the file and the line, and never the token."""
    path = private(tmp_path / "tokens", *lines)

    with pytest.raises(StartError, match=says) as raised:
        Tokens(config(token_file=path))
    assert str(path) in str(raised.value)
    assert READER not in str(raised.value)

    path.unlink()
    with pytest.raises(StartError, match="cannot be read"):
        Tokens(config(token_file=path))


def test_a_changed_token_file_is_read_again(files, monkeypatch):
    """Rotation needs no restart; a file that became unusable leaves the last good tokens valid."""
    monkeypatch.setattr("serve.security.CHECKED_EVERY_S", 0)
    tokens = Tokens(config(**files))

    private(files["token_file"], ROTATED, STRANGER)
    assert outcome(tokens, "ModelInfer", bearer(STRANGER)) == "allowed"
    assert outcome(tokens, "ModelInfer", bearer(READER)) is Unauthenticated

    files["token_file"].unlink()
    assert outcome(tokens, "ModelInfer", bearer(STRANGER)) == "allowed"


def test_tokens_are_in_no_log_and_no_object(files):
    """Neither what is logged nor what is kept holds a token."""
    files["token_file"].chmod(0o644)
    with captured() as logs:
        tokens = Tokens(config(**files))
        outcome(tokens, "ModelInfer", bearer(STRANGER))

    assert [line["event"] for line in logs] == ["secret readable by everybody"]
    kept = (
        repr(logs) + repr(vars(tokens)) + repr([vars(each) for each in vars(tokens).values() if hasattr(each, "value")])
    )
    assert READER not in kept
    assert STRANGER not in kept


def exposed(**options):
    with captured() as logs:
        warn_exposed(config(**options))
    return [line["event"] for line in logs]


def test_what_the_network_can_do_is_said_at_the_start(tmp_path):
    """Loopback and a socket are nobody else's; on other addresses each gap is a line."""
    some = tmp_path / "file"
    assert exposed() == []
    assert exposed(host="::1", admin=True) == []
    assert exposed(host="0.0.0.0", socket=some) == []
    assert exposed(host="0.0.0.0") == ["anybody in the network may call", "plain text in the network"]
    assert exposed(host="::", token_file=some) == ["plain text in the network"]
    assert exposed(host="0.0.0.0", token_file=some, tls_cert=some, tls_key=some) == []
    assert exposed(host="0.0.0.0", tls_cert=some, tls_key=some, tls_client_ca=some, admin=True) == []
    assert "anybody in the network may load and unload models" in exposed(host="0.0.0.0", admin=True)


@contextlib.contextmanager
def on_socket(path):
    server = grpc.server(ThreadPoolExecutor(1), handlers=[Echo()])
    with private_socket(path) as address:
        server.add_insecure_port(address)
    server.start()
    try:
        yield address
    finally:
        server.stop(0).wait()


def test_a_socket_is_its_owners_and_goes_with_the_server(tmp_path):
    """Mode 0600, calls are answered, and nothing is left when the server has stopped."""
    path = tmp_path / "s"
    before = os.umask(0o022)
    os.umask(before)
    with on_socket(path) as address, grpc.insecure_channel(address) as channel:
        assert path.stat().st_mode & 0o777 == 0o600
        assert channel.unary_unary("/x/y")(b"hello", timeout=10) == b"hello"
        assert os.umask(before) == before

    assert not path.exists()


def test_a_socket_that_is_in_use_is_not_taken(tmp_path):
    """The server that listens there goes on; gRPC alone would have taken the path from it."""
    path = tmp_path / "s"
    with on_socket(path) as address:
        with pytest.raises(StartError, match="in use"), private_socket(path):
            pass
        with grpc.insecure_channel(address) as channel:
            assert channel.unary_unary("/x/y")(b"hello", timeout=10) == b"hello"


def test_a_socket_that_an_ended_server_left_is_replaced(tmp_path):
    """Nobody listens there any more, so it does not keep the next server from starting."""
    path = tmp_path / "s"
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))

    with on_socket(path) as address, grpc.insecure_channel(address) as channel:
        assert channel.unary_unary("/x/y")(b"hello", timeout=10) == b"hello"


def test_no_file_is_removed_for_a_socket(tmp_path):
    """What is there and is no socket stays, also a link that leads nowhere."""
    (tmp_path / "file").write_text("kept")
    (tmp_path / "link").symlink_to(tmp_path / "nowhere")
    for name in ("file", "link"):
        with pytest.raises(StartError, match="is no socket"), private_socket(tmp_path / name):
            pass
    assert (tmp_path / "file").read_text() == "kept"
    assert (tmp_path / "link").is_symlink()


def test_a_path_that_no_socket_can_have_is_an_error(tmp_path):
    """Too long for the system, or in a folder that is not there."""
    for path, says in [(Path("/tmp") / ("x" * 120), "107 bytes"), (tmp_path / "no" / "s", "not a folder")]:
        with pytest.raises(StartError, match=says), private_socket(path):
            pass


# the whole server


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    write_image_bundle(root / "colour" / "1")
    for name, dtype in [("echo", np.float32), ("long", np.int64)]:
        (root / name / "1").mkdir(parents=True)
        (root / name / "1" / "model.onnx").write_bytes(identity(dtype, [None, 2]))
    return root


@pytest.fixture(params=["completion-queue", "asyncio"])
def serving(models, request):
    """Starts a server with options, on each transport."""

    @contextlib.contextmanager
    def serve(**options):
        server = start(
            ServeConfig(paths=(models,), port=0, device="cpu", threads=1, transport=request.param, **options)
        )
        try:
            yield server
        finally:
            server.stop(drain_s=0)

    return serve


@contextlib.contextmanager
def calling(server, channel_credentials=None):
    options = [("grpc.max_send_message_length", -1), ("grpc.use_local_subchannel_pool", 1)]
    address = server.address if server.address.startswith("unix:") else f"localhost:{server.port}"
    if channel_credentials is None:
        channel = grpc.insecure_channel(address, options)
    else:
        channel = grpc.secure_channel(address, channel_credentials, options)
    with channel:
        yield rpc.GRPCInferenceServiceStub(channel), channel


def code(call, *arguments, **options):
    """The status of a call; of a stream, after all its answers."""
    try:
        answer = call(*arguments, timeout=20, **options)
        if isinstance(answer, grpc.Call):
            list(answer)
    except grpc.RpcError as error:
        return error.code()
    return grpc.StatusCode.OK


def numbers(rows):
    request = pb.ModelInferRequest(model_name="echo", raw_input_contents=[bytes(8 * rows)])
    request.inputs.add(name="x", datatype="FP32", shape=[rows, 2])
    return request


def picture(data):
    request = pb.ModelInferRequest(model_name="colour", raw_input_contents=[len(data).to_bytes(4, "little") + data])
    request.inputs.add(name="photo", datatype="BYTES", shape=[1, 1])
    return request


def test_a_server_with_tokens_answers_those_who_have_one(serving, files):
    """Every kind of call is refused without a token: unary, streams and reflection; probes are answered."""
    known, stranger = {"metadata": [bearer(READER)]}, {"metadata": [bearer(STRANGER)]}
    reflect = reflection_pb2.ServerReflectionRequest(list_services="")
    with serving(**files) as server, calling(server) as (stub, channel):
        health = health_pb2_grpc.HealthStub(channel)
        reflection = reflection_pb2_grpc.ServerReflectionStub(channel)
        for call, request in [
            (stub.ModelInfer, numbers(1)),
            (stub.ServerMetadata, pb.ServerMetadataRequest()),
            (stub.ModelStreamInfer, iter([numbers(1)])),
            (reflection.ServerReflectionInfo, iter([reflect])),
        ]:
            assert code(call, request) is grpc.StatusCode.UNAUTHENTICATED
            assert code(call, request, **stranger) is grpc.StatusCode.UNAUTHENTICATED
        assert code(stub.ModelInfer, numbers(1), **known) is grpc.StatusCode.OK
        assert code(stub.ServerMetadata, pb.ServerMetadataRequest(), **known) is grpc.StatusCode.OK
        assert code(stub.ModelStreamInfer, iter([numbers(1)]), **known) is grpc.StatusCode.OK
        assert code(reflection.ServerReflectionInfo, iter([reflect]), **known) is grpc.StatusCode.OK
        assert stub.ServerLive(pb.ServerLiveRequest()).live
        assert health.Check(health_pb2.HealthCheckRequest()).status == health_pb2.HealthCheckResponse.SERVING


@pytest.mark.parametrize("path", [CALL + "ModelStreamInfer", CALL + "ModelInfer", wire.REFLECTION])
def test_a_call_that_is_refused_has_no_answer(serving, files, path):
    """Who reads a stream gets its status, and no message before it that says nothing."""
    with serving(**files) as server, calling(server) as (_, channel):
        answers = channel.stream_stream(path)(iter([b""]), timeout=20)
        with pytest.raises(grpc.RpcError):
            next(answers)
        assert answers.code() is grpc.StatusCode.UNAUTHENTICATED


def test_administration_needs_its_own_token_over_the_wire(serving, files):
    """A token for inference may call, but not unload."""
    request = pb.RepositoryModelUnloadRequest(model_name="echo")
    with serving(admin=True, **files) as server, calling(server) as (stub, _):
        assert code(stub.RepositoryModelUnload, request) is grpc.StatusCode.UNAUTHENTICATED
        assert code(stub.RepositoryModelUnload, request, metadata=[bearer(READER)]) is grpc.StatusCode.PERMISSION_DENIED
        assert code(stub.ModelInfer, numbers(1), metadata=[bearer(READER)]) is grpc.StatusCode.OK
        assert code(stub.RepositoryModelUnload, request, metadata=[bearer(ADMIN)]) is grpc.StatusCode.OK
        assert code(stub.ModelInfer, numbers(1), metadata=[bearer(ADMIN)]) is grpc.StatusCode.UNAVAILABLE


def test_administration_is_off_unless_asked_for(serving):
    """Loading, unloading and changing the log are not there, whoever asks; reading the index and the settings is."""
    changes = pb.LogSettingsRequest()
    changes.settings["log_info"].bool_param = False
    with serving() as server, calling(server) as (stub, _):
        for call, request in [
            (stub.RepositoryModelLoad, pb.RepositoryModelLoadRequest(model_name="echo")),
            (stub.RepositoryModelUnload, pb.RepositoryModelUnloadRequest(model_name="echo")),
            (stub.LogSettings, changes),
        ]:
            assert code(call, request) is grpc.StatusCode.UNIMPLEMENTED
        assert code(stub.LogSettings, pb.LogSettingsRequest()) is grpc.StatusCode.OK
        assert code(stub.RepositoryIndex, pb.RepositoryIndexRequest()) is grpc.StatusCode.OK
        assert "model_repository" not in stub.ServerMetadata(pb.ServerMetadataRequest()).extensions
        assert code(stub.ModelInfer, numbers(1)) is grpc.StatusCode.OK


def test_a_server_with_tls_and_tokens(serving, files, pki):
    """With mTLS a client needs both: a certificate to connect, a token to call."""
    options = {"tls_cert": pki / "server.pem", "tls_key": pki / "server.key", "tls_client_ca": pki / "authority.pem"}
    with serving(**options, **files) as server:
        with calling(server, trust(pki, client="client")) as (stub, _):
            assert code(stub.ModelInfer, numbers(1), metadata=[bearer(READER)]) is grpc.StatusCode.OK
            assert code(stub.ModelInfer, numbers(1)) is grpc.StatusCode.UNAUTHENTICATED
        with calling(server, trust(pki)) as (stub, _):
            assert code(stub.ModelInfer, numbers(1), metadata=[bearer(READER)]) is grpc.StatusCode.UNAVAILABLE


def test_a_server_on_a_socket(serving, files, tmp_path):
    """With tokens as on a port; the socket is gone when the server has stopped."""
    path = tmp_path / "s"
    with serving(socket=path, **files) as server:
        with calling(server) as (stub, _):
            assert code(stub.ModelInfer, numbers(1), metadata=[bearer(READER)]) is grpc.StatusCode.OK
            assert code(stub.ModelInfer, numbers(1)) is grpc.StatusCode.UNAUTHENTICATED
        assert path.stat().st_mode & 0o777 == 0o600
    assert not path.exists()


def test_a_refused_message_is_not_read(serving, files):
    """Without a token the size of the message does not matter: nobody looks at it."""
    with serving(max_message_bytes=1 << 20, **files) as server, calling(server) as (stub, _):
        large = numbers(1 << 18)
        assert code(stub.ModelInfer, large) is grpc.StatusCode.UNAUTHENTICATED
        assert code(stub.ModelInfer, large, metadata=[bearer(READER)]) is grpc.StatusCode.RESOURCE_EXHAUSTED


def test_a_message_that_inflates_beyond_the_limit_is_refused(serving):
    """What counts is the size after decompression; a small one is inflated and answered."""
    gzip = {"compression": grpc.Compression.Gzip}
    with serving(max_message_bytes=1 << 20) as server, calling(server) as (stub, _):
        assert code(stub.ModelInfer, numbers(1 << 19), **gzip) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert code(stub.ModelInfer, numbers(1 << 10), **gzip) is grpc.StatusCode.OK


def test_an_answer_above_the_limit_is_refused(serving):
    """A byte for each zero of the request, and eight of the answer; the next call is answered."""
    request = pb.ModelInferRequest(model_name="long")
    request.inputs.add(name="x", datatype="INT64", shape=[1 << 15, 2]).contents.int64_contents.extend([0] * (1 << 16))
    with serving(max_message_bytes=1 << 18) as server, calling(server) as (stub, _):
        assert code(stub.ModelInfer, request) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert code(stub.ModelStreamInfer, iter([request])) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert code(stub.ModelInfer, numbers(1)) is grpc.StatusCode.OK


def test_more_than_fits_is_refused_and_the_next_call_is_answered(serving):
    """Bytes and streams beyond the limits are RESOURCE_EXHAUSTED at once, and end nothing else."""
    with serving(max_bytes=1 << 16, max_streams=1) as server, calling(server) as (stub, _):
        assert code(stub.ModelInfer, numbers(1 << 14)) is grpc.StatusCode.RESOURCE_EXHAUSTED
        assert code(stub.ModelInfer, numbers(1)) is grpc.StatusCode.OK

        requests = queue.SimpleQueue()
        first = stub.ModelStreamInfer(iter(requests.get, None))
        requests.put(numbers(1))
        next(first)
        assert code(stub.ModelStreamInfer, iter([numbers(1)])) is grpc.StatusCode.RESOURCE_EXHAUSTED
        requests.put(None)
        assert list(first) == []
        assert code(stub.ModelStreamInfer, iter([numbers(1)])) is grpc.StatusCode.OK


def test_one_connection_too_many_is_closed(serving, monkeypatch):
    """The clients before it are answered, and so is the next one when one of them has gone."""
    monkeypatch.setitem(wire._OPTIONS, "grpc.max_allowed_incoming_connections", 1)
    with serving() as server:
        with calling(server) as (stub, _), calling(server) as (other, _):
            assert code(stub.ModelInfer, numbers(1)) is grpc.StatusCode.OK
            assert code(other.ModelInfer, numbers(1)) is grpc.StatusCode.UNAVAILABLE
            assert code(stub.ModelInfer, numbers(1)) is grpc.StatusCode.OK
        with calling(server) as (other, _):
            assert code(other.ModelInfer, numbers(1), wait_for_ready=True) is grpc.StatusCode.OK


def test_one_call_too_many_on_a_connection_waits(serving, monkeypatch):
    """It is not refused: the client sends it when one of the others has ended."""
    monkeypatch.setitem(wire._OPTIONS, "grpc.max_concurrent_streams", 1)
    with serving() as server, calling(server) as (stub, _):
        requests = queue.SimpleQueue()
        first = stub.ModelStreamInfer(iter(requests.get, None))
        requests.put(numbers(1))
        next(first)
        second = stub.ModelInfer.future(numbers(1), timeout=20)
        for _ in range(20):
            requests.put(numbers(1))
            next(first)
        assert not second.done()
        requests.put(None)
        assert second.code() is grpc.StatusCode.OK


def test_connections_and_their_calls_have_a_limit():
    """As docs/operations.md says."""
    limits = dict(wire.options(config()))

    assert limits["grpc.max_allowed_incoming_connections"] == 1024
    assert limits["grpc.max_concurrent_streams"] == 1024


def test_a_refused_example_is_not_kept(serving):
    """An error that is told holds nothing of its request, which would else stay until a garbage collection."""
    with serving() as server, calling(server) as (stub, _):
        assert code(stub.ModelInfer, picture(png("red"))) is grpc.StatusCode.OK
        bad = picture(bytes(1 << 20))
        gc.collect()
        gc.disable()
        tracemalloc.start()
        try:
            for _ in range(8):
                assert code(stub.ModelInfer, bad) is grpc.StatusCode.INVALID_ARGUMENT
            grown, _ = tracemalloc.get_traced_memory()
        finally:
            tracemalloc.stop()
            gc.enable()

    assert grown < 3 << 20


def test_refused_calls_are_in_the_metrics(serving, files):
    """By why they were refused."""
    with serving(http_port=0, **files) as server, calling(server) as (stub, _):
        assert code(stub.ModelInfer, numbers(1)) is grpc.StatusCode.UNAUTHENTICATED
        with urllib.request.urlopen(f"http://127.0.0.1:{server.http_port}/metrics", timeout=10) as answer:
            lines = answer.read().decode().splitlines()

    assert 'edgeward_refused_calls_total{reason="unauthenticated"} 1.0' in lines
