"""The checks of the conformance kit on what a backend says: its name, its limits, its claim, and proof of that."""

from __future__ import annotations

import re
from dataclasses import replace
from importlib.metadata import PackageNotFoundError, version
from typing import Any

import torch

from tessera.attention.checks import Problems, Subject, plain_shape
from tessera.attention.contract import Limits, Phase, Shape
from tessera.attention.prove import prove_alone
from tessera.attention.step import Bucket
from tessera.errors import BackendError

PROOF_SIZES = {
    Phase.PREFILL: (Bucket(2, 33, 33), Bucket(2, 20, 300)),
    Phase.DECODE: (Bucket(1, 1, 100), Bucket(8, 1, 700)),
    Phase.VISION: (Bucket(3, 64, 64),),
}
"""Steps that are profiled."""
ODD_HEAD_DIMS, ODD_GROUPS, ODD_PAGE_SIZES = (1, 7, 100, 2048), (5, 13, 2048), (1, 7, 24, 8192)
"""Sizes that few serve: who does not claim them must refuse them."""


def claim(subject: Subject) -> Problems:
    """`claim` names at least one kernel, in patterns that compile."""
    said = subject.backend.claim(subject.phase, subject.base)
    problems = [] if said.must else ["claim().must is empty: it must name at least one kernel"]
    for pattern in (*said.must, *said.must_not):
        try:
            re.compile(pattern)
        except re.error as error:
            problems.append(f"claim() holds {pattern!r}, which is no regular expression: {error}")
    return problems


def proof(subject: Subject) -> Problems:
    """A profiler sees the kernels of `claim` run, and none that it excludes."""
    for size in PROOF_SIZES[subject.phase]:
        try:
            prove_alone(subject.backend(subject.phase, plain_shape(subject)), size)
        except BackendError as error:
            return [f"{error.message} ({size.num_seqs} sequences of {size.q_len} new and {size.kv_len} tokens)"]
    return []


def identity(subject: Subject) -> Problems:
    """The name is a plain word, and every distribution in `packages` has a version."""
    backend = subject.backend
    problems = []
    if not re.fullmatch(r"[a-z0-9_]+(:[a-z0-9_]+)?", backend.name):
        problems.append(f"name {backend.name!r} is not of the form library or library:variant in small letters")
    for package in backend.packages:
        try:
            version(package)
        except PackageNotFoundError:
            problems.append(f"packages names {package!r}, of which no version is installed")
    return problems


def refusals(subject: Subject) -> Problems:
    """What the limits leave out is refused with a reason."""
    accepted = []
    for what, shape in unclaimed_shapes(subject.base, subject.limits, subject.phase):
        if not subject.backend.reasons_against(subject.phase, shape):
            accepted.append(f"reasons_against() is empty for {what}, which the limits leave out")
    absent = [phase for phase in Phase if phase not in subject.backend.limits]
    accepted += [
        f"reasons_against() is empty for {phase}, which has no limits"
        for phase in absent
        if not subject.backend.reasons_against(phase, subject.base)
    ]
    return accepted


def unclaimed_shapes(base: Shape, limits: Limits, phase: Phase) -> list[tuple[str, Shape]]:
    """What lies outside `limits`, each in words and as a shape that asks for nothing else beyond them."""
    changes: list[tuple[str, dict[str, Any]]] = []
    changes += [(f"dtype {x}", {"dtype": x}) for x in (torch.float64, torch.int8) if x not in limits.dtypes]
    changes += [(f"head_dim {x}", {"head_dim": x}) for x in ODD_HEAD_DIMS if x not in limits.head_dims]
    changes += [
        (f"a group of {x}", {"num_q_heads": x, "num_kv_heads": 1}) for x in ODD_GROUPS if x not in limits.groups
    ]
    if phase is not Phase.VISION:
        changes += [(f"page size {x}", {"page_size": x}) for x in ODD_PAGE_SIZES if x not in limits.page_sizes]
        changes += [] if limits.bidirectional else [("attention both ways", {"causal": False})]
    changes += [] if "meta" in limits.devices else [("device meta", {"device_type": "meta"})]
    changes += [] if limits.windows else [("a sliding window", {"window": 16})]
    changes += [] if limits.soft_caps else [("a soft cap", {"soft_cap": 30.0})]
    changes += [] if limits.sinks else [("attention sinks", {"sinks": True})]
    if base.device_type == "cuda" and limits.min_capability > (0, 0):
        changes.append(("a GPU older than min_capability", {"capability": (limits.min_capability[0] - 1, 0)}))
    return [(what, replace(base, **change)) for what, change in changes]


def open_page_size(subject: Subject) -> Problems:
    """Before a page size is chosen backends are asked with none: that alone is no reason to refuse."""
    reasons = subject.backend.reasons_against(subject.phase, replace(subject.base, page_size=None))
    return [f"it refuses: {'; '.join(reasons)}"] if reasons else []
