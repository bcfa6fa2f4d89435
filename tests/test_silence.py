"""Nothing of edgeward talks to anyone, and nothing writes below a user's home.

The guard is a library that is loaded before all others. It notes every attempt to reach an address outside loopback,
to look a name up, or to listen elsewhere, and refuses it, so that no packet leaves. It sees what goes through the C
library, which is how Python, onnxruntime and gRPC reach the network.
"""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from finetune.checkpoint import load_checkpoint

ROOT = Path(__file__).parents[1]
GOLDEN = Path(__file__).parent / "golden"

GUARD = r"""
#define _GNU_SOURCE
#include <arpa/inet.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/socket.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static void note(const char *call, const char *whom) {
    char line[512];
    const char *log = getenv("NETWORK_LOG");
    int length = snprintf(line, sizeof line, "%s %.400s\n", call, whom);
    int file = log ? open(log, O_WRONLY | O_CREAT | O_APPEND, 0600) : -1;
    if (file < 0 || write(file, line, length) != length) abort();  /* better no process than one unseen */
    close(file);
}

static int outside(const char *call, const struct sockaddr *address) {
    char text[INET6_ADDRSTRLEN] = "?";
    if (address == NULL) return 0;
    if (address->sa_family == AF_INET) {
        const struct in_addr *v4 = &((const struct sockaddr_in *)address)->sin_addr;
        if (ntohl(v4->s_addr) >> 24 == 127) return 0;
        inet_ntop(AF_INET, v4, text, sizeof text);
    } else if (address->sa_family == AF_INET6) {
        const struct in6_addr *v6 = &((const struct sockaddr_in6 *)address)->sin6_addr;
        if (IN6_IS_ADDR_LOOPBACK(v6) || (IN6_IS_ADDR_V4MAPPED(v6) && v6->s6_addr[12] == 127)) return 0;
        inet_ntop(AF_INET6, v6, text, sizeof text);
    } else {
        return 0;
    }
    note(call, text);
    errno = ENETUNREACH;
    return 1;
}

int connect(int s, const struct sockaddr *to, socklen_t size) {
    return outside("connect", to) ? -1 : REAL(connect)(s, to, size);
}
int bind(int s, const struct sockaddr *at, socklen_t size) {
    return outside("bind", at) ? -1 : REAL(bind)(s, at, size);
}
ssize_t sendto(int s, const void *data, size_t n, int flags, const struct sockaddr *to, socklen_t size) {
    return outside("sendto", to) ? -1 : REAL(sendto)(s, data, n, flags, to, size);
}
ssize_t sendmsg(int s, const struct msghdr *message, int flags) {
    return outside("sendmsg", message->msg_name) ? -1 : REAL(sendmsg)(s, message, flags);
}
int sendmmsg(int s, struct mmsghdr *messages, unsigned int n, int flags) {
    for (unsigned int i = 0; i < n; i++)
        if (outside("sendmmsg", messages[i].msg_hdr.msg_name)) return -1;
    return REAL(sendmmsg)(s, messages, n, flags);
}

static int local(const char *name) {
    unsigned char address[16];
    return name == NULL || !strcmp(name, "localhost") || inet_pton(AF_INET, name, address) == 1
        || inet_pton(AF_INET6, name, address) == 1;
}
int getaddrinfo(const char *name, const char *service, const struct addrinfo *hints, struct addrinfo **found) {
    if (local(name)) return REAL(getaddrinfo)(name, service, hints, found);
    note("getaddrinfo", name);
    return EAI_AGAIN;
}
struct hostent *gethostbyname(const char *name) {
    if (local(name)) return REAL(gethostbyname)(name);
    note("gethostbyname", name);
    h_errno = TRY_AGAIN;
    return NULL;
}
int gethostbyname_r(
    const char *name, struct hostent *host, char *buffer, size_t n, struct hostent **found, int *error
) {
    if (local(name)) return REAL(gethostbyname_r)(name, host, buffer, n, found, error);
    note("gethostbyname_r", name);
    *found = NULL;
    *error = TRY_AGAIN;
    return EAGAIN;
}
"""

PREDICT = """
import sys
from pathlib import Path
from bundle.model import load_model
for path in map(Path, sys.argv[1:]):
    model = load_model(path)
    raws = [golden.read_bytes() for golden in sorted(path.glob("goldens/?.???"))]
    assert len(next(iter(model.predict(raws * 20).values()))) == 20 * len(raws) >= 40
"""
SERVE = """
import sys
from pathlib import Path
from serve.client import Client
from serve.config import ServeConfig
from serve.server import start
server = start(ServeConfig((Path(sys.argv[1]),), port=0, device="cpu"))
with Client(f"127.0.0.1:{server.port}") as client:
    raws = [golden.read_bytes() for golden in sorted(Path(sys.argv[1]).glob("goldens/?.???"))]
    assert len(next(iter(client.predict("mood", raws).values()))) == len(raws) > 0
server.stop(0)
"""
REACH_OUT = """
import socket
def attempt(kind, call):
    with socket.socket(*kind) as s:
        try:
            call(s)
        except OSError as error:
            print(type(error).__name__, error.errno)
tcp, udp = (socket.AF_INET, socket.SOCK_STREAM), (socket.AF_INET, socket.SOCK_DGRAM)
six = socket.AF_INET6, socket.SOCK_DGRAM
attempt(tcp, lambda s: s.connect(("192.0.2.1", 443)))
attempt(udp, lambda s: s.sendto(b"x", ("192.0.2.2", 53)))
attempt(udp, lambda s: s.sendmsg([b"x"], [], 0, ("192.0.2.3", 53)))
attempt(six, lambda s: s.connect(("2001:db8::1", 443)))
attempt(tcp, lambda s: s.bind(("0.0.0.0", 0)))
attempt(tcp, lambda s: socket.getaddrinfo("name.invalid", 443))
"""
LOOPBACK = """
import socket
for family, host in ((socket.AF_INET, "127.0.0.1"), (socket.AF_INET, "localhost")):
    with socket.create_server((host, 0), family=family) as server, socket.create_connection(server.getsockname()) as s:
        s.sendall(b"x")
        assert server.accept()[0].recv(1) == b"x"
"""


@pytest.fixture(scope="module")
def guard(tmp_path_factory):
    compiler = shutil.which("cc")
    if compiler is None or sys.platform != "linux":
        pytest.skip("the guard needs Linux and a C compiler")
    source = tmp_path_factory.mktemp("guard") / "guard.c"
    source.write_text(GUARD)
    library = source.with_suffix(".so")
    subprocess.run([compiler, "-Wall", "-Werror", "-shared", "-fPIC", "-o", library, source, "-ldl"], check=True)
    return library


@pytest.fixture
def run_guarded(guard, tmp_path):
    """Run Python under the guard, at a home that is empty and without a word of CI; see what is left of it."""

    def run(*arguments):
        home, log, elsewhere = tmp_path / "home", tmp_path / "network.log", tmp_path / "elsewhere"
        home.mkdir()
        elsewhere.mkdir()
        environment = {
            "PATH": os.environ["PATH"],
            "HOME": str(home),
            **{f"XDG_{kind}_HOME": str(home / kind) for kind in ("CACHE", "CONFIG", "DATA", "STATE")},
            "TMPDIR": str(tmp_path),
            "PYTHONPATH": str(ROOT),
            "LD_PRELOAD": str(guard),
            "NETWORK_LOG": str(log),
        }
        done = subprocess.run(
            [sys.executable, *map(str, arguments)],
            cwd=elsewhere,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        written = sorted(str(each.relative_to(tmp_path)) for each in (*home.rglob("*"), *elsewhere.rglob("*")))
        return done.stdout, written, log.read_text().splitlines() if log.exists() else []

    return run


SILENT = {
    "predict": ["-c", PREDICT, *sorted(GOLDEN.glob("format-*"))],
    "verify": ["-m", "edgeward", "verify", GOLDEN / "format-1-text"],
    "inspect": ["-m", "edgeward", "inspect", GOLDEN / "format-1-text"],
    "serve": ["-c", SERVE, GOLDEN / "format-1-text"],
}


@pytest.mark.parametrize("arguments", SILENT.values(), ids=SILENT)
def test_nothing_is_written_at_home_and_nobody_is_called(run_guarded, arguments):
    """With CI unset and a fresh home, no file appears and no connection, name lookup or listener off loopback."""
    _, written, attempts = run_guarded(*arguments)

    assert written == []
    assert attempts == []


def test_scoring_is_silent(run_guarded, tmp_path):
    """Files are scored by processes of their own without a word to anyone, or a file at home."""
    (tmp_path / "texts.csv").write_text("text\n" + "a film\n" * 20)
    arguments = [GOLDEN / "format-1-text", tmp_path / "texts.csv", "--out", tmp_path / "out", "--unit-rows", "10"]
    _, written, attempts = run_guarded("-m", "edgeward", "score", *arguments, "--processes", "2")

    assert (tmp_path / "out" / "_SUCCESS").is_file()
    assert written == []
    assert attempts == []


def test_what_is_closed_at_the_start_is_no_sockets_place():
    """Where the command was started without stderr, what a library writes to it reaches no client."""
    show = "lambda arguments: print(*((os.readlink(f'/proc/self/fd/{fd}'), os.get_inheritable(fd)) for fd in (0, 2)))"
    program = f"import os; from edgeward import __main__ as command; command.run = {show}; command.main()"
    closing = [shutil.which("sh"), "-c", 'exec "$0" -c "$1" <&- 2>&-', sys.executable, program]
    done = subprocess.run(closing, stdout=subprocess.PIPE, text=True, check=True)

    assert done.stdout == "('/dev/null', True) ('/dev/null', True)\n"


def test_training_and_export_are_silent(run_guarded, text_checkpoint, tmp_path):
    """A model is fine-tuned, compiled and gated without a word to anyone, or a file at home that is not our cache."""
    config = load_checkpoint(text_checkpoint).spec.provenance.config
    train = ["finetune", config["model"], config["data"], "--out", tmp_path / "checkpoint", "--no-cache"]
    train += ["--max-length", "48"]
    export = ["export", text_checkpoint, "--out", tmp_path / "bundle", "--variant", "int8-dynamic", "--max-drop", "20"]
    export += ["--no-cache"]
    program = "import sys; from edgeward.__main__ import run; i = sys.argv.index('export'); "
    program += "assert run(sys.argv[1:i]) == 0 == run(sys.argv[i:])"
    _, written, attempts = run_guarded("-c", program, *train, *export)

    assert (tmp_path / "bundle" / "manifest.sha256").is_file()
    ours = "home/CACHE/edgeward/matplotlib"  # the fonts that reports are drawn with
    assert [each for each in written if not each.startswith(ours) and not ours.startswith(each)] == []
    assert attempts == []


def test_guard_sees_and_refuses_every_way_out(run_guarded):
    """The guard works: each attempt to reach a documentation address is noted, and fails before it leaves."""
    output, _, attempts = run_guarded("-c", REACH_OUT)

    assert output.splitlines() == ["OSError 101"] * 5 + ["gaierror -3"]
    assert attempts == [
        "connect 192.0.2.1",
        "sendto 192.0.2.2",
        "sendmsg 192.0.2.3",
        "connect 2001:db8::1",
        "bind 0.0.0.0",
        "getaddrinfo name.invalid",
    ]


def test_guard_lets_loopback_through(run_guarded):
    """What stays on this machine is no concern of the guard."""
    assert run_guarded("-c", LOOPBACK) == ("", [], [])


def test_runtime_alone_is_not_silent(run_guarded):
    """What is switched off is really there: imported by itself, the runtime writes below the user's home."""
    _, written, _ = run_guarded("-c", "import onnxruntime")

    if not written:
        pytest.skip("this onnxruntime has no telemetry")
    assert any("onnxruntime" in each for each in written)
