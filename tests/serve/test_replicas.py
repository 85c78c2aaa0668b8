"""ivc-serve --replicas: what it asks of Ray, and where Ray is installed (make ray), two replicas."""

from __future__ import annotations

import base64
import importlib.util
import json
import os
import signal
import socket
import subprocess
import sys
import time
import types
import urllib.error
import urllib.request
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
from openai import NotFoundError, OpenAI
from openai.types.chat import ChatCompletionUserMessageParam

from ivc_export import cli
from ivc_export.bundle.bundle import Bundle
from ivc_export.cli import replicas
from ivc_export.cli.serve import parse
from ivc_export.errors import UserError
from ivc_export.runtime.chat import Chat
from ivc_export.runtime.onnxruntime.cpu import OnnxSession
from ivc_export.text.sampling import Sampling
from tests.conftest import SHAPES

with_ray = pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="Ray is not installed: make ray")
QUESTION = "Where is the ring?"


class FakeServe(types.ModuleType):
    """ray.serve, as far as an application is made with it."""

    def __init__(self) -> None:
        super().__init__("ray.serve")
        self.asked: dict[str, Any] = {}

    def ingress(self, make: Any) -> Any:
        self.make = make
        return lambda: self

    def deployment(self, made: object, **asked: Any) -> Any:
        assert made is self
        self.asked = asked
        return self

    def bind(self) -> FakeServe:
        return self


class FakeCluster(FakeServe):
    """ray.serve on a cluster. applications, proxies: what it serves, and on which machines.

    events: what was asked of it and of Ray, in order. refusal: what becomes of a deployment.
    """

    def __init__(self) -> None:
        super().__init__()
        self.applications: list[str] = []
        self.proxies: list[str] = []
        self.events: list[str] = []
        self.refusal: Exception | None = None
        self.ray = types.ModuleType("ray")
        self.ray.init = lambda where, **_: self.events.append("join")  # type: ignore[attr-defined]
        self.ray.shutdown = lambda: self.events.append("leave")  # type: ignore[attr-defined]

    def status(self) -> FakeCluster:
        return self

    def start(self, **options: object) -> None:
        self.events.append("start")
        self.proxies.append("one")

    def run(self, built: object, name: str, **options: object) -> None:
        self.events.append("run")
        self.applications.append(name)
        if self.refusal is not None:
            raise self.refusal

    def delete(self, name: str) -> None:
        self.events.append("delete")
        self.applications.remove(name)

    def shutdown(self) -> None:
        self.events.append("shutdown")


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> FakeServe:
    serve = FakeServe()
    monkeypatch.setattr(replicas, "load_ray", lambda module: serve)
    return serve


def test_an_application_takes_the_options_of_the_command(fake: FakeServe, sample_bundle: Bundle) -> None:
    given = {"bundle": sample_bundle.folder, "replicas": "2", "replica_cpus": 3, "queue": 4, "max-tokens": "7"}
    replicas.app({**given, "allow_remote_images": True, "host": "0.0.0.0"})
    assert fake.asked == {
        "name": "ivc",
        "num_replicas": 2,
        "max_ongoing_requests": 5 + replicas.SPARE,
        "ray_actor_options": {"num_cpus": 3, "num_gpus": 0},
    }
    served = fake.make()
    assert {route.path for route in served.routes} >= {"/", "/v1/chat/completions", "/metrics"}
    (guard,) = served.user_middleware
    settings = guard.kwargs["settings"]
    assert (settings.queue, settings.most_tokens, settings.remote_images, settings.loopback) == (4, 7, True, False)


def test_switches_alone_are_said_by_true_and_false() -> None:
    given = {"bundle": "x", "name": "is=true", "allow_remote_images": "TRUE", "queue": 3, "private": False}
    assert replicas.command_line(given) == ["--name=is=true", "--allow-remote-images", "--queue=3", "--", "x"]


def test_a_range_of_replicas_scales_with_the_requests(fake: FakeServe, sample_bundle: Bundle) -> None:
    replicas.app({"bundle": str(sample_bundle.folder), "replicas": "1-8", "allow_remote_images": "false"})
    assert fake.asked["autoscaling_config"] == {"min_replicas": 1, "max_replicas": 8}
    assert "num_replicas" not in fake.asked


def test_a_backend_on_a_gpu_reserves_one(fake: FakeServe, sample_bundle: Bundle) -> None:
    given = {"bundle": sample_bundle.folder, "backend": "onnxruntime-cuda"}
    replicas.app(given)
    assert fake.asked["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 1}
    replicas.app({**given, "replica_gpus": 0.5})
    assert fake.asked["ray_actor_options"] == {"num_cpus": 1, "num_gpus": 0.5}


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({}, "the following arguments are required: bundle"),
        ({"bundle": "nowhere"}, "is not a bundle"),
        ({"bundle": "B", "speed": 3}, "unrecognized arguments: --speed=3"),
        ({"bundle": "B", "queue": -1}, "--queue -1 is out of range: give 0 or more"),
        (
            {"bundle": "B", "replicas": "3-2"},
            "3-2 is not a number of replicas: give one such as 4, or a range such as 1-8",
        ),
        ({"bundle": "B", "replicas": 0}, "0 is not a number of replicas"),
        ({"bundle": "B", "replica_cpus": 0}, "--replica-cpus 0 is out of range: give 1 or more"),
        ({"bundle": "B", "replica_gpus": 2}, "a replica computes on one GPU, so give 1 or a fraction"),
        ({"bundle": "B", "replica_gpus": 0, "backend": "tensorrt"}, "--replica-gpus 0 is out of range"),
        ({"bundle": "B", "op_library": "x.so"}, "--op-library is for onnxruntime-cuda"),
    ],
)
def test_what_an_application_cannot_do_is_one_sentence(
    given: dict[str, object], said: str, fake: FakeServe, sample_bundle: Bundle
) -> None:
    if given.get("bundle") == "B":
        given = {**given, "bundle": sample_bundle.folder}
    with pytest.raises(UserError) as caught:
        replicas.app(given)
    assert said in str(caught.value)
    assert fake.asked == {}


def test_replicas_that_no_machine_here_has_room_for_are_refused() -> None:
    options = parse(["bundle", "--replicas", "4-8", "--replica-cpus", "2"])
    replicas.check_room(options, {"CPU": 8})
    with pytest.raises(
        UserError, match=r"^--replicas 4 needs 8 cores, but this machine has 2: give a smaller number, or start Ray"
    ):
        replicas.check_room(options, {"CPU": 2})
    options = parse(["bundle", "--replicas", "1", "--backend", "tensorrt"])
    with pytest.raises(UserError, match=r"^--replicas 1 needs 1 GPU, but this machine has 0: "):
        replicas.check_room(options, {"CPU": 2})


def test_without_ray_the_sentence_names_the_extra(
    sample_bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "ray", None)
    assert cli.ivc_serve([str(sample_bundle.folder), "--replicas", "2"]) == 2
    said = capsys.readouterr().err
    assert said.startswith("error: --replicas needs more packages (") and "install ivc-export[ray]" in said


def test_a_cluster_that_is_not_there_is_one_sentence(
    fake: FakeServe, sample_bundle: Bundle, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def init(where: str, **options: object) -> None:
        raise ConnectionError(f"no Ray at {where}")

    monkeypatch.setattr(fake, "init", init, raising=False)
    monkeypatch.setattr(fake, "shutdown", lambda: None, raising=False)
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    assert cli.ivc_serve([str(sample_bundle.folder), "--replicas", "2"]) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert said.startswith("error: the cluster at 127.0.0.1:9 cannot be reached (no Ray at 127.0.0.1:9): start it with")


@pytest.fixture
def joined(sample_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> FakeCluster:
    """A cluster that serves nothing yet."""
    found = FakeCluster()
    monkeypatch.setattr(replicas, "load_ray", lambda module: found if module == "ray.serve" else found.ray)
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    return found


def interrupt() -> None:
    raise KeyboardInterrupt


def test_ray_serve_ends_with_the_process_that_started_it(
    joined: FakeCluster, sample_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(signal, "pause", interrupt)
    assert cli.ivc_serve([str(sample_bundle.folder), "--replicas", "2"]) == 0
    assert joined.events == ["join", "start", "run", "delete", "shutdown", "leave"]


def test_ray_serve_stays_for_others_who_use_it_by_now(
    joined: FakeCluster, sample_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pause() -> None:
        joined.applications.append("another")
        interrupt()

    monkeypatch.setattr(signal, "pause", pause)
    assert cli.ivc_serve([str(sample_bundle.folder), "--replicas", "2"]) == 0
    assert joined.events == ["join", "start", "run", "delete", "leave"] and joined.applications == ["another"]


def test_ray_serve_ends_where_replicas_do_not_start(
    joined: FakeCluster, sample_bundle: Bundle, capsys: pytest.CaptureFixture[str]
) -> None:
    joined.refusal = RuntimeError("no bundle there")
    assert cli.ivc_serve([str(sample_bundle.folder), "--replicas", "2"]) == 2
    assert "error: the replicas did not start: no bundle there" in capsys.readouterr().err
    assert joined.events == ["join", "start", "run", "delete", "shutdown", "leave"]


@pytest.mark.parametrize("there", ["applications", "proxies"])
def test_a_cluster_that_serves_already_is_left_as_it_is(
    joined: FakeCluster, sample_bundle: Bundle, capsys: pytest.CaptureFixture[str], there: str
) -> None:
    getattr(joined, there).append("another")
    assert cli.ivc_serve([str(sample_bundle.folder), "--replicas", "2"]) == 2
    assert "error: the cluster at auto already runs Ray Serve: " in capsys.readouterr().err
    assert joined.events == ["join", "leave"]


def test_replicas_need_a_port_that_is_known(sample_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.ivc_serve([str(sample_bundle.folder), "--replicas", "2", "--port", "0"]) == 2
    assert "--port 0 is out of range: replicas share one port, so give its number" in capsys.readouterr().err


def test_cores_of_replicas_are_for_replicas(sample_bundle: Bundle, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.ivc_serve([str(sample_bundle.folder), "--replica-cpus", "2"]) == 2
    assert "--replica-cpus is for replicas: use it with --replicas, or leave it out" in capsys.readouterr().err


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as sock:
        port: int = sock.getsockname()[1]
    return port


@pytest.fixture(scope="module")
def cluster(sample_bundle: Bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of two replicas, which end without a trace."""
    log, port = tmp_path_factory.mktemp("ray") / "log.txt", free_port()
    command = [sys.executable, "-c", "import sys; from ivc_export import cli; sys.exit(cli.ivc_serve())"]
    command += [str(sample_bundle.folder), "--name", "tiny", "--replicas", "2", "--port", str(port)]
    alone = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    with log.open("w") as output:
        server = subprocess.Popen(command, stdout=output, stderr=output, env=alone)
    until = time.monotonic() + 240
    while f"serving tiny at http://127.0.0.1:{port}" not in log.read_text():
        assert server.poll() is None and time.monotonic() < until, log.read_text()
        time.sleep(0.2)
    yield f"http://127.0.0.1:{port}"
    server.send_signal(signal.SIGTERM)
    assert server.wait(60) == 0, log.read_text()
    assert "Traceback" not in log.read_text()
    with pytest.raises(OSError):
        socket.create_connection(("127.0.0.1", port), 1)


def get(url: str, **headers: str) -> tuple[int, str]:
    """Status and body."""
    try:
        with urllib.request.urlopen(urllib.request.Request(url, headers=headers)) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read().decode()


def messages() -> list[ChatCompletionUserMessageParam]:
    url = "data:image/png;base64," + base64.b64encode(SHAPES.read_bytes()).decode()
    content: Any = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": QUESTION}]
    return [{"role": "user", "content": content}]


@pytest.fixture(scope="module")
def client(cluster: str) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{cluster}/v1", api_key="none", max_retries=0) as found:
        yield found


@pytest.fixture(scope="module")
def alone(sample_bundle: Bundle) -> str:
    """What one session answers."""
    return "".join(Chat(OnnxSession(sample_bundle), 0.4, sampling=Sampling(max_tokens=8)).ask(QUESTION, [SHAPES]))


@with_ray
def test_replicas_answer_as_one_session_does_whole_and_streamed(client: OpenAI, alone: str) -> None:
    more = {"ratio": 0.4}
    whole = client.chat.completions.create(model="tiny", messages=messages(), max_tokens=8, extra_body=more)
    assert whole.choices[0].message.content == alone
    assert whole.usage is not None and whole.usage.completion_tokens > 1
    chunks = client.chat.completions.create(
        model="tiny", messages=messages(), max_tokens=8, extra_body=more, stream=True
    )
    pieces = [chunk.choices[0].delta.content or "" for chunk in chunks]
    assert "".join(pieces) == alone and len(pieces) > 3


@with_ray
def test_both_replicas_answer(cluster: str, client: OpenAI, alone: str) -> None:
    def ask(number: int) -> str | None:
        more = {"ratio": 0.4}
        reply = client.chat.completions.create(model="tiny", messages=messages(), max_tokens=8, extra_body=more)
        return reply.choices[0].message.content

    with ThreadPoolExecutor(12) as pool:
        assert [*pool.map(ask, range(24))] == [alone] * 24
    texts = (get(f"{cluster}/metrics")[1] for _ in range(40))
    lines = (line for text in texts for line in text.splitlines())
    counts = {float(line.split()[1]) for line in lines if line.startswith('ivc_requests_total{outcome="answered"}')}
    assert 0 < min(counts) < 24  # as many are counted as one of two replicas had


@with_ray
def test_refusals_are_those_of_one_server(cluster: str, client: OpenAI) -> None:
    with pytest.raises(NotFoundError, match="there is no model other: this server has tiny"):
        client.chat.completions.create(model="other", messages=messages())
    status, said = get(f"{cluster}/health", Host="example.com")
    assert status == 403 and "names another machine" in json.loads(said)["error"]["message"]
    assert json.loads(get(f"{cluster}/health")[1])["status"] == "ok"


@with_ray
def test_a_port_that_is_taken_is_one_sentence(cluster: str, sample_bundle: Bundle) -> None:
    port = cluster.rpartition(":")[2]
    command = [sys.executable, "-c", "import sys; from ivc_export import cli; sys.exit(cli.ivc_serve())"]
    done = subprocess.run(
        [*command, str(sample_bundle.folder), "--replicas", "1", "--port", port], capture_output=True, text=True
    )
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(f"error: the server cannot listen on port {port} of 127.0.0.1 (")
