import http.client
import socket
import threading
from contextlib import closing, suppress

import pytest

from bundle.log import captured
from serve.errors import StartError
from serve.http import MAX_CONNECTIONS, HttpPort


@pytest.fixture
def state():
    return {"ready": True, "metrics": b"# TYPE requests counter\nrequests 1\n"}


@pytest.fixture
def port(state):
    http_port = HttpPort("127.0.0.1", 0, metrics=lambda: state["metrics"], ready=lambda: state["ready"])
    yield http_port
    http_port.stop()


def ask(port, path, method="GET"):
    with closing(http.client.HTTPConnection(*port.address, timeout=10)) as connection:
        connection.request(method, path)
        response = connection.getresponse()
        return response, response.read()


def talk(port, request):
    """The whole answer to raw bytes; what the server does not read resets the connection after it."""
    answer = b""
    with socket.create_connection(port.address, timeout=10) as client, suppress(ConnectionResetError):
        client.sendall(request)
        while part := client.recv(1 << 16):
            answer += part
    return answer


def test_metrics_are_given_as_prometheus_wants_them(port, state):
    """/metrics answers what it was given, with the content type of the text format."""
    response, body = ask(port, "/metrics")

    assert (response.status, body) == (200, state["metrics"])
    assert response.getheader("Content-Type") == "text/plain; version=0.0.4; charset=utf-8"


def test_ready_follows_the_server_and_live_does_not(port, state):
    """A server that loads or drains is alive but not ready."""
    assert ask(port, "/readyz")[0].status == 200

    state["ready"] = False

    assert ask(port, "/readyz")[0].status == 503
    assert ask(port, "/livez")[0].status == 200


def test_a_query_does_not_change_the_path(port):
    """Probes may carry a query."""
    assert ask(port, "/livez?verbose=1")[0].status == 200


@pytest.mark.parametrize("path", ["/", "/metrics/", "/v2/health/ready", "/../etc/passwd", "/livez%00", "*"])
def test_there_is_nothing_else(port, path):
    """Every other path is 404 and names those that there are."""
    response, body = ask(port, path)

    assert response.status == 404
    assert body == b"there are /metrics, /livez and /readyz\n"


@pytest.mark.parametrize("path", ["/metrics", "/livez", "/nothing"])
def test_head_gives_the_headers_of_get_alone(port, path):
    """HEAD is GET without the body."""
    got, body = ask(port, path)
    head, nothing = ask(port, path, "HEAD")

    assert (head.status, nothing) == (got.status, b"")
    assert head.getheader("Content-Length") == str(len(body))


@pytest.mark.parametrize("method", ["POST", "PUT", "PATCH", "DELETE", "OPTIONS"])
def test_other_methods_are_refused(port, method):
    """Nothing can be changed through this port."""
    response, _ = ask(port, "/metrics", method)

    assert response.status == 405
    assert response.getheader("Allow") == "GET, HEAD"


@pytest.mark.parametrize(
    ("request_", "answer"),
    [
        (b"BREW /livez HTTP/1.1\r\n\r\n", b"Unsupported method ('BREW')"),
        (b"GET /livez HTTP/9.9\r\n\r\n", b"Invalid HTTP version (9.9)"),
        (b"GET\r\n\r\n", b"Bad request syntax ('GET')"),
        (b"GET /livez xxx\r\n\r\n", b"Bad request version ('xxx')"),
        (b"GET /" + b"x" * 70_000 + b" HTTP/1.1\r\n\r\n", b" 414 "),
        (b"GET /livez HTTP/1.1\r\n" + b"a: b\r\n" * 200 + b"\r\n", b"Too many headers"),
        (b"GET /livez HTTP/1.1\r\na: " + b"b" * 70_000 + b"\r\n\r\n", b"Line too long"),
    ],
)
def test_malformed_requests_are_refused(port, request_, answer):
    """What is no request is told why, by a server that does not say what it is made of; the next one is answered."""
    got = talk(port, request_)

    assert answer in got
    assert b"Python" not in got
    assert ask(port, "/livez")[0].status == 200


def test_clients_that_send_nothing_keep_no_probe_out(port):
    """With more silent connections than there may be, a probe is answered, and the oldest are closed."""
    silent = [socket.create_connection(port.address, timeout=10) for _ in range(2 * MAX_CONNECTIONS)]
    try:
        assert ask(port, "/readyz")[0].status == 200
        assert silent[0].recv(1) == b""
        assert sum(thread.name.startswith("Thread-") for thread in threading.enumerate()) <= 2 * MAX_CONNECTIONS
    finally:
        for client in silent:
            client.close()


def test_a_client_that_goes_away_is_not_an_error(port):
    """A connection that is reset before or within its request leaves no trace in the log."""
    with captured() as logs:
        for sent in (b"", b"GET /met", b"GET /metrics HTTP/1.1\r\n\r\n"):
            with socket.create_connection(port.address, timeout=10) as client:
                client.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\1\0\0\0\0\0\0\0")  # reset, not FIN
                client.sendall(sent)
        assert ask(port, "/livez")[0].status == 200

    assert logs == []


def test_a_failure_reveals_nothing(port, state):
    """When metrics cannot be made, the client is told an id, and the cause stands in the log under it."""
    del state["metrics"]

    with captured() as logs:
        response, body = ask(port, "/metrics")

    assert response.status == 500
    assert b"KeyError" not in body
    assert logs[0]["id"].encode() in body
    assert isinstance(logs[0]["exc_info"], KeyError)


def test_ipv6_is_served():
    """The port listens where the host says, also on IPv6."""
    try:
        port = HttpPort("::1", 0, metrics=bytes, ready=lambda: True)
    except StartError:
        pytest.skip("this machine has no IPv6")
    try:
        assert ask(port, "/livez")[0].status == 200
    finally:
        port.stop()


def test_a_port_that_is_taken_is_refused(port):
    """Two servers never share the port."""
    with pytest.raises(StartError, match=f"HTTP port {port.port} of 127.0.0.1 cannot be bound: Address already in use"):
        HttpPort("127.0.0.1", port.port, metrics=bytes, ready=lambda: True)


def test_a_host_that_is_not_there_is_refused():
    """An address of another machine is a clear error."""
    with pytest.raises(StartError, match=r"HTTP port 0 of 192\.0\.2\.1 cannot be bound"):
        HttpPort("192.0.2.1", 0, metrics=bytes, ready=lambda: True)


def test_stopping_closes_the_port_and_its_connections(port):
    """After stop nobody can connect, and a client that waits is let go."""
    with socket.create_connection(port.address, timeout=10) as client:
        assert ask(port, "/livez")[0].status == 200  # so the connection before it was accepted
        port.stop()

        assert client.recv(1) == b""
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(port.address, timeout=10)
