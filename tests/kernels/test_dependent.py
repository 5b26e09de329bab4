"""Kernels that start before those before them are over compute what they compute one after the other."""

from __future__ import annotations

from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from tessera.kernels.scores import Scores
from tessera.kernels.turn import Turn
from triton_interpreter import DEVICE, needs_cuda

pytest.importorskip("triton", reason="triton is not installed")
from tessera.kernels.decode_merge import Workspace
from tessera.kernels.decode_shares import Shares, share_by_length, share_evenly, share_in_runs
from tessera.kernels.dependent import launch_constants, pdl_on
from tessera.kernels.norm import add_rms_norm, rms_norm
from tessera.kernels.paged_decode import paged_decode
from tessera.kernels.rope_pages import rope_pages
from tessera.kernels.sampling import sample
from tessera.kernels.small_linear import Norm, small_linear
from tessera.kernels.swiglu import swiglu

HIDDEN, Q_HEADS, KV_HEADS, HEAD_DIM, SIZE, VOCAB = 576, 9, 3, 64, 1536, 1000
LAYERS, PAGES, PAGE_SIZE = 5, 48, 16
EPS = 1e-6
OPTIONS = {"BLOCK_N": 32, "NUM_STAGES": 3, "num_warps": 1}
REPLAYS = 200


def test_a_cpu_has_no_dependent_launches() -> None:
    assert not pdl_on(torch.device("cpu"))


@pytest.mark.parametrize(("capability", "expected"), [((8, 9), False), ((9, 0), True), ((10, 0), True)])
def test_hopper_and_later_have_them(
    capability: tuple[int, int], expected: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
    assert pdl_on.__wrapped__(torch.device("cuda", 0)) is expected


def test_the_kernel_is_told_if_and_only_if_the_launch_is() -> None:
    assert launch_constants(True) == {"PDL": True, "launch_pdl": True}
    assert launch_constants(False) == {"PDL": False}


class Layer(NamedTuple):
    """Weights of one layer and its pages."""

    norm: Tensor
    qkv: Tensor
    output: Tensor
    mlp_norm: Tensor
    gate_up: Tensor
    down: Tensor
    k_pages: Tensor
    v_pages: Tensor


class Step(NamedTuple):
    """What is written anew before each step."""

    hidden: Tensor
    slots: Tensor
    kv_lens: Tensor
    page_table: Tensor
    cosines: Tensor
    sines: Tensor
    parameters: Tensor


def random(*shape: int) -> Tensor:
    return torch.randn(shape, device=DEVICE).to(torch.bfloat16)


def make_layer() -> Layer:
    def weight(outputs: int, inputs: int) -> Tensor:
        return random(outputs, inputs).div(inputs**0.5)

    heads = Q_HEADS * HEAD_DIM
    return Layer(
        random(HIDDEN), weight((Q_HEADS + 2 * KV_HEADS) * HEAD_DIM, HIDDEN), weight(HIDDEN, heads),
        random(HIDDEN), weight(2 * SIZE, HIDDEN), weight(HIDDEN, SIZE),
        random(PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM), random(PAGES, PAGE_SIZE, KV_HEADS, HEAD_DIM),
    )  # fmt: skip


def make_step(num_seqs: int) -> Step:
    """A step of decodes, each of another length, on pages that are shuffled and nobody shares."""
    pages = PAGES // num_seqs
    table = torch.randperm(PAGES, device=DEVICE).int()[: num_seqs * pages].view(num_seqs, pages)
    kv_lens = torch.randint(1, pages * PAGE_SIZE + 1, (num_seqs,), device=DEVICE).int()
    last = kv_lens.long() - 1
    slots = table.gather(1, (last // PAGE_SIZE)[:, None])[:, 0].long() * PAGE_SIZE + last % PAGE_SIZE
    draws = torch.randint(0, 2**20, (num_seqs, 1), device=DEVICE).double() / 2**20
    parameters = torch.tensor([[0.8, 20, 0.9, 0]], device=DEVICE).double().expand(num_seqs, -1)
    angles = torch.randn(num_seqs, 1, HEAD_DIM, device=DEVICE)
    return Step(
        random(num_seqs, HIDDEN), slots, kv_lens, table, angles.cos().bfloat16(),
        angles[..., : HEAD_DIM // 2].sin().bfloat16(), torch.cat([parameters, draws], 1),
    )  # fmt: skip


class Chain:
    """Every kernel of ours that a step of decodes launches, in order, on one workspace; nothing else between them."""

    def __init__(self, num_seqs: int, shares: Shares) -> None:
        self.layers = [make_layer() for _ in range(LAYERS)]
        self.head, self.last_norm = random(VOCAB, HIDDEN) / HIDDEN**0.5, random(HIDDEN)
        self.shares, self.scores = shares, Scores(HEAD_DIM**-0.5, None, None)
        parts = max(1, shares.capacity(num_seqs)) * KV_HEADS
        self.workspace = Workspace.allocate(parts, 16, HEAD_DIM, DEVICE)

    def attend(self, layer: Layer, qkv: Tensor, step: Step, pdl: bool) -> Tensor:
        q, k, v = torch.split(qkv.view(len(qkv), -1, HEAD_DIM), [Q_HEADS, KV_HEADS, KV_HEADS], 1)
        turn = Turn(rotation=(step.cosines, step.sines))
        q = rope_pages(q, k, v, turn, layer.k_pages, layer.v_pages, step.slots, pdl=pdl)
        return paged_decode(
            q, layer.k_pages, layer.v_pages, None, step.kv_lens, step.kv_lens, step.page_table, self.workspace,
            self.shares, True, self.scores, OPTIONS, pdl=pdl,
        ).flatten(1)  # fmt: skip

    def fused(self, step: Step, pdl: bool) -> Tensor:
        """As a model of a few rows: six launches a layer; the answer is the tokens and the last hidden state."""
        hidden = step.hidden
        for layer in self.layers:
            qkv = small_linear(hidden, layer.qkv, norm=Norm(layer.norm, EPS), pdl=pdl)
            hidden = small_linear(self.attend(layer, qkv, step, pdl), layer.output, residual=hidden, pdl=pdl)
            gated = small_linear(hidden, layer.gate_up, norm=Norm(layer.mlp_norm, EPS), gated=True, pdl=pdl)
            hidden = small_linear(gated, layer.down, residual=hidden, pdl=pdl)
        return self.tokens(rms_norm(hidden, self.last_norm, EPS, pdl=pdl), step, pdl)

    def apart(self, step: Step, pdl: bool) -> Tensor:
        """As a model of more rows: norms and SwiGLU are launches of their own; some products are torch's."""
        hidden, update = step.hidden, torch.zeros_like(step.hidden)
        for layer in self.layers:
            hidden, normed = add_rms_norm(hidden, update, layer.norm, EPS, pdl=pdl)
            attended = self.attend(layer, normed @ layer.qkv.t(), step, pdl)
            update = small_linear(attended, layer.output, pdl=pdl)
            hidden, normed = add_rms_norm(hidden, update, layer.mlp_norm, EPS, pdl=pdl)
            gated = swiglu(small_linear(normed, layer.gate_up, pdl=pdl), pdl=pdl)
            update = small_linear(gated, layer.down, pdl=pdl)
        return self.tokens(add_rms_norm(hidden, update, self.last_norm, EPS, pdl=pdl)[1], step, pdl)

    def tokens(self, normed: Tensor, step: Step, pdl: bool) -> Tensor:
        logits = small_linear(normed, self.head, pdl=pdl).float()
        return torch.cat([sample(logits, step.parameters, pdl=pdl)[:, None].double(), normed.double()], 1)


@needs_cuda
@pytest.mark.parametrize("way", ["fused", "apart"])
@pytest.mark.parametrize(
    ("num_seqs", "shared"),
    [(1, "evenly"), (4, "evenly"), (4, "by length"), (16, "by length"), (4, "in runs"), (16, "in runs")],
)
def test_a_graph_of_dependent_launches_answers_as_one_without_to_the_bit(way: str, num_seqs: int, shared: str) -> None:
    if not pdl_on(torch.device("cuda")):
        pytest.skip("a GPU from Hopper on is needed")
    torch.manual_seed(num_seqs)
    longest = PAGES // num_seqs * PAGE_SIZE
    shares = {
        "evenly": share_evenly(num_seqs, 4, 32),
        "by length": share_by_length(num_seqs, 40, 32, longest),
        "in runs": share_in_runs(num_seqs, 40, 32, longest),
    }[shared]
    chain, step = Chain(num_seqs, shares), make_step(num_seqs)
    run = chain.fused if way == "fused" else chain.apart
    start = [pages.clone() for layer in chain.layers for pages in (layer.k_pages, layer.v_pages)]

    def rewind() -> list[Tensor]:
        """What the pages hold, which then hold again what they did at the start."""
        pools = [pages for layer in chain.layers for pages in (layer.k_pages, layer.v_pages)]
        held = [pages.clone() for pages in pools]
        for pages, first in zip(pools, start):
            pages.copy_(first)
        return held

    graphs, answers = [], []
    for pdl in (True, False):
        run(step, pdl)
        torch.cuda.synchronize()
        graphs.append(torch.cuda.CUDAGraph())
        with torch.cuda.graph(graphs[-1]):
            answers.append(run(step, pdl))
    rewind()
    for _ in range(REPLAYS):
        for target, new in zip(step, make_step(num_seqs)):
            target.copy_(new)
        found = []
        for graph, answer in zip(graphs, answers):
            graph.replay()
            found.append([answer.clone(), *rewind()])
        assert all(torch.equal(*pair) for pair in zip(*found))
        assert found[0][0].isfinite().all()
    assert not chain.workspace.arrivals.any()
