"""The cases to time, the configurations to try, and the figures of peers to beat (us, measured before on an H200)."""

from __future__ import annotations

from dataclasses import dataclass, replace

from decode import DecodeConfig
from prefill import PrefillConfig


@dataclass(frozen=True)
class DecodeCase:
    """Decode over pages of 16."""

    name: str
    heads: tuple[int, int]
    head_dim: int
    kv_lens: tuple[int, ...]
    peer_us: float | None
    predicted_us: float

    @property
    def kv_bytes(self) -> int:
        """Bytes of keys and values that must be read."""
        return sum(self.kv_lens) * self.heads[1] * self.head_dim * 4


@dataclass(frozen=True)
class PrefillCase:
    """Prefill of equal sequences: causal over pages, or packed without a mask."""

    name: str
    heads: tuple[int, int]
    head_dim: int
    num_seqs: int
    q_len: int
    kv_len: int
    causal: bool
    peer_us: float | None
    predicted_us: float

    @property
    def flops(self) -> float:
        """Operations, half of the new square where causal."""
        pairs = self.q_len * self.kv_len - (self.q_len * self.q_len / 2 if self.causal else 0)
        return 4.0 * self.num_seqs * self.heads[0] * self.head_dim * pairs


MIXED = tuple(128 + (i * 2654435761) % 3968 for i in range(64))
DECODE_CASES = (
    DecodeCase("B1 L4096 32/8 128", (32, 8), 128, (4096,), 15.0, 10),
    DecodeCase("B1 L32768 32/8 128", (32, 8), 128, (32768,), 43.9, 41),
    DecodeCase("B8 L4096 32/8 128", (32, 8), 128, (4096,) * 8, 44.4, 41),
    DecodeCase("B64 L4096 32/8 128", (32, 8), 128, (4096,) * 64, 253.2, 258),
    DecodeCase("B256 L1024 16/8 128", (16, 8), 128, (1024,) * 256, 262.8, 265),
    DecodeCase("B256 L1024 9/3 64", (9, 3), 64, (1024,) * 256, 65.3, 60),
    DecodeCase("B1 L4096 9/3 64", (9, 3), 64, (4096,), 10.6, 8),
    DecodeCase("B64 mixed 128..4096 32/8 128", (32, 8), 128, MIXED, None, 140),
    DecodeCase("B8 one 32768 rest 1024 32/8 128", (32, 8), 128, (32768, *(1024,) * 7), None, 55),
)
PREFILL_CASES = (
    PrefillCase("B8 S1024 32/8 128 causal", (32, 8), 128, 8, 1024, 1024, True, 152.7, 230),
    PrefillCase("B2 S4096 32/8 128 causal", (32, 8), 128, 2, 4096, 4096, True, 420.9, 720),
    PrefillCase("B1 S16384 32/8 128 causal", (32, 8), 128, 1, 16384, 16384, True, 3328, 5300),
    PrefillCase("B8 S1024 9/3 64 causal", (9, 3), 64, 8, 1024, 1024, True, 39.1, 55),
    PrefillCase("B4 Q512 KV8192 32/8 128 causal", (32, 8), 128, 4, 512, 8192, True, None, 620),
)
PACKED_CASES = (
    PrefillCase("B4 S4096 16/16 64 full", (16, 16), 64, 4, 4096, 4096, False, 518.8, 760),
    PrefillCase("B4 S4096 16/16 72 full", (16, 16), 72, 4, 4096, 4096, False, 672.7, 1050),
    PrefillCase("B4 S4096 16/16 80 full", (16, 16), 80, 4, 4096, 4096, False, 615.4, 1050),
    PrefillCase("B1 S1024 16/16 80 full", (16, 16), 80, 1, 1024, 1024, False, 39.0, 33),
)


def decode_configs(heads: tuple[int, int], head_dim: int) -> list[DecodeConfig]:
    """Compiled variants for one shape, the likeliest first. num_splits costs no compilation and is swept apart."""
    base = DecodeConfig(num_stages=5)
    configs = [
        base,
        replace(base, block_n=32, num_warps=2),
        replace(base, fused=False),
        replace(base, balanced=True),
        replace(base, dot="cols"),
        replace(base, num_stages=3),
        replace(base, block_n=128, num_stages=3),
        replace(base, block_n=32, num_warps=4),
        replace(base, block_n=32, num_warps=1),
        replace(base, num_warps=2),
        replace(base, block_n=32, num_warps=2, num_stages=7),
        replace(base, block_n=32, num_warps=2, balanced=True),
        replace(base, block_n=64, num_stages=2),
        replace(base, dot="cols", block_n=128, num_stages=3),
        replace(base, dot="cores", block_n=16, num_stages=3),
        replace(base, dot="cores", block_n=8, num_stages=3),
        replace(base, dot="cores", block_n=8, num_warps=2, num_stages=1),
    ]
    if head_dim == 64:
        wide = replace(base, heads=heads[1], block_n=32)
        configs += [wide, replace(wide, num_stages=3), replace(wide, num_warps=2), replace(wide, balanced=True)]
        configs += [replace(base, block_n=128, num_stages=5), replace(base, block_n=128, num_warps=2, num_stages=3)]
    else:
        wide = replace(base, heads=2, block_n=32)
        configs += [wide, replace(wide, num_stages=3)]
    return configs


def split_choices(config: DecodeConfig) -> list[DecodeConfig]:
    """The same compiled kernel with other grids."""
    if config.balanced:
        return [replace(config, programs_per_sm=n) for n in (1, 2, 3, 4)]
    automatic = [replace(config, programs_per_sm=n, min_split=m) for n in (1, 2, 4, 8) for m in (128, 256)]
    fixed_size = [replace(config, num_splits=64, min_split=m) for m in (256, 512, 1024)]
    return automatic + fixed_size


PAGED_CONFIGS = (
    PrefillConfig(128, 128, 8, 2),
    PrefillConfig(128, 64, 8, 3),
    PrefillConfig(128, 64, 8, 5),
    PrefillConfig(128, 128, 8, 3),
    PrefillConfig(64, 64, 4, 3),
    PrefillConfig(64, 128, 4, 3),
    PrefillConfig(128, 64, 4, 3),
    PrefillConfig(128, 128, 8, 2, tma=True),
    PrefillConfig(128, 64, 8, 3, tma=True),
    PrefillConfig(128, 128, 8, 3, tma=True),
    PrefillConfig(64, 64, 4, 3, tma=True),
)
PACKED_CONFIGS = (
    PrefillConfig(128, 64, 8, 3),
    PrefillConfig(128, 128, 8, 2),
    PrefillConfig(128, 64, 8, 4),
    PrefillConfig(128, 128, 8, 3),
    PrefillConfig(64, 64, 4, 3),
    PrefillConfig(128, 64, 4, 3),
    PrefillConfig(64, 128, 4, 2),
    PrefillConfig(128, 64, 8, 3, cut_head=False),
    PrefillConfig(128, 128, 8, 2, cut_head=False),
)
