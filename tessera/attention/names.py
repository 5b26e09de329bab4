"""What a user may have meant by a name that no backend has: another engine's word, another spelling, a slip."""

from __future__ import annotations

import difflib
import re
from collections.abc import Sequence

_ELSEWHERE = (
    (r"(?:fa|flash_?(?:attn|attention))_?v?([234])", r"flash_attn:\1"),
    (r"fa|flash|flash_?(?:attn|attention)", "flash_attn"),
    (r"fi|flash_?infer(?:_attn)?", "flashinfer"),
    (r"sdpa|torch|pytorch|torch_native|cpu_attn", "torch_sdpa"),
    (r"sdpa_(flash|cudnn|efficient|math)", r"torch_sdpa:\1"),
    (r"cudnn(?:_attn)?", "torch_sdpa:cudnn"),
    (r"eager", "naive"),
    (r"flex_?(?:attn|attention)", "flex"),
    (r"triton_?(?:attn|attention)", "triton"),
    (r"xformers?(?:_attn)?", "xformers"),
)
"""Words of vLLM, SGLang, transformers and their users, in small letters, and our name or library for the same."""
_SUFFIX = "_vllm_v1"


def meant_by(name: str, known: Sequence[str]) -> list[str]:
    """The names of `known` that `name` may stand for, of a library all its variants; empty where nothing is near."""
    word = re.sub(r"[\s-]+", "_", name.strip().lower()).removesuffix(_SUFFIX)
    for pattern, ours in _ELSEWHERE:
        if found := re.fullmatch(pattern, word):
            word = found.expand(ours)
            break
    exact = [other for other in known if other == word]
    variants = [other for other in known if other.partition(":")[0] == word]
    return exact or variants or difflib.get_close_matches(word, known, n=1)
