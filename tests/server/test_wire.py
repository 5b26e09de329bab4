"""What crosses between the processes: every message arrives as it was sent, and nothing on the way unpickles."""

from __future__ import annotations

import re
import stat
from pathlib import Path

import msgspec
import pytest

import tessera
from tessera.config import EngineConfig
from tessera.errors import ConfigError
from tessera.server import ipc
from tessera.types import (
    AttentionBucket,
    AttentionChoice,
    AttentionProof,
    EngineInfo,
    EngineStatus,
    KernelUse,
    Output,
    Request,
    SamplingParams,
    TokenLogprobs,
)

PARAMS = SamplingParams(n=3, stop=["a", "b"], logit_bias={5: -1.5}, logprobs=2, seed=2**62, max_tokens=None)
LOGPROBS = TokenLogprobs(7, -0.25, 1, [(7, -0.25), (8, float("-inf"))])
BUCKET = AttentionBucket("1 x 512", 1, 1, 512, "naive", None, {"naive": 0.5})
PROOF = AttentionProof("decode", "a:b", "b", [KernelUse("k", 30, 1.5)], 0.25, "1 x 9", {"torch": "2"}, "cpu")
CHOICES = [AttentionChoice("prefill", "naive", "x", {"y": ["z"]}, [BUCKET], [PROOF])]
INFO = EngineInfo("m", "llama", "float32", "cpu", 10, 20, [2], 16, 5, 4, 64, CHOICES)


@pytest.mark.parametrize(
    "message",
    [
        ipc.Start(EngineConfig.from_flat({"dtype": "float32", "num_pages": 7}), "debug"),
        ipc.Add(Request("r", [1, 2, 3], PARAMS)),
        ipc.Abort("r", 2),
        ipc.Abort("r"),
        ipc.Stop(),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_to_the_engine_arrive_as_sent(message: ipc.ToEngine) -> None:
    assert ipc.decode_to_engine(ipc.encode([message])) == [message]


@pytest.mark.parametrize(
    "message",
    [
        ipc.Ready(INFO),
        ipc.Failed("no", None, "ModelError"),
        ipc.Report(EngineStatus(running=3), [Output("r", 1, [5], [LOGPROBS], [None, LOGPROBS], "stop", 2, 16)]),
        ipc.Refused("r", "no", "hint", "prompt"),
        ipc.Crashed("RuntimeError: x"),
    ],
    ids=lambda message: type(message).__name__,
)
def test_messages_from_the_engine_arrive_as_sent(message: ipc.FromEngine) -> None:
    assert ipc.decode_from_engine(ipc.encode(message)) == message


@pytest.mark.parametrize("data", [b"", b"\x80\x04K\x01.", msgspec.msgpack.encode({"type": "eval", "x": 1})])
def test_anything_else_is_not_decoded(data: bytes) -> None:
    with pytest.raises(msgspec.DecodeError):
        ipc.decode_to_engine(data)


def test_the_socket_lies_in_a_private_directory_that_goes_away() -> None:
    socket = ipc.ApiSocket()
    folder = Path(socket.address.removeprefix("ipc://")).parent
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    socket.close()
    assert not folder.exists()


def test_a_directory_too_long_for_a_socket_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / ("long" * 25)
    folder.mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(folder))
    with pytest.raises(ConfigError, match="TMPDIR"):
        ipc.ApiSocket()
    assert not any(folder.iterdir())


def test_no_module_can_unpickle_or_evaluate() -> None:
    """ShadowMQ and its kin: code that is not there cannot be reached by a message."""
    forbidden = re.compile(
        r"^\s*(?:import|from)\s+(?:\w+\s*,\s*)*(?:pickle|cloudpickle|dill|marshal|shelve|jsonpickle)\b"
        r"|torch\.load\(|recv_pyobj|send_pyobj|trust_remote_code=True|(?<![\w.])(?:eval|exec)\(",
        re.MULTILINE,
    )
    root = Path(tessera.__file__).parent
    files = list(root.rglob("*.py"))
    assert any(file.name == "ipc.py" for file in files)
    found = {str(file.relative_to(root)): forbidden.findall(file.read_text()) for file in files}
    assert {name: hits for name, hits in found.items() if hits} == {}
