"""What an online benchmark sends its load to: servers of ours, one a backend, and URLs."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from tessera.bench.record import CacheState, Subject
from tessera.bench.served.load import Dialect
from tessera.bench.served.servers import START_SECONDS, ExternalServer, Server, ServerProcess
from tessera.bench.subjects import Wanted
from tessera.errors import ConfigError, TesseraError


@dataclass(frozen=True)
class OwnTarget:
    """A server that is started for each repeat, with `flags` of `tessera serve` and a backend."""

    wanted: Wanted
    flags: Sequence[str]
    environment: Mapping[str, str] | None = None
    start_seconds: float = START_SECONDS

    @property
    def label(self) -> str:
        """As in tables."""
        return self.wanted.label

    @property
    def idle(self) -> Subject:
        """As long as nothing runs."""
        return self.wanted.subject

    @property
    def reasons(self) -> list[str]:
        """Why it cannot serve here."""
        return self.wanted.reasons

    @property
    def cache(self) -> CacheState:
        """Each replay has prompts of its own, so it finds nothing in a cache that earlier ones filled."""
        return "off" if "--no-enable-prefix-caching" in self.flags else "cold"

    @property
    def about(self) -> str:
        """What is started."""
        return shlex.join(["tessera", "serve", *self._all_flags])

    @property
    def _all_flags(self) -> list[str]:
        return [*self.flags, *(f"--{name.replace('_', '-')}={value}" for name, value in self.wanted.settings.items())]

    def start(self) -> tuple[Server, Subject]:
        """A server, ready, and what it runs; TesseraError where it does not come up."""
        server = ServerProcess(self._all_flags, self.environment, self.start_seconds)
        try:
            return server, server.subject(self.wanted)
        except BaseException:
            server.stop()
            raise


@dataclass(frozen=True)
class UrlTarget:
    """A server that somebody else started and that stays up."""

    label: str
    url: str
    api_key: str | None = field(default=None, repr=False)
    reasons: Sequence[str] = ()
    cache: CacheState = "not recorded"
    """Who knows what it was sent before; `cached_prompt_share` tells of each replay where the server does."""
    dialect: Dialect = field(default_factory=Dialect, repr=False, compare=False)
    """What it turned out to understand, in all repeats."""

    @property
    def idle(self) -> Subject:
        """As long as nothing is known of it."""
        return Subject(self.label, engine="server", note=f"at {self.url}")

    @property
    def about(self) -> str:
        """Nothing is started."""
        return ""

    def start(self) -> tuple[Server, Subject]:
        """The server and what it says of itself; TesseraError where it does not answer."""
        server = ExternalServer(self.url, self.api_key, self.dialect)
        return server, server.subject(self.label)


Target = OwnTarget | UrlTarget


def check_names(targets: Sequence[Target]) -> None:
    """ConfigError where two have one name: their rows could not be told apart."""
    labels = [target.label for target in targets]
    for label in labels:
        if labels.count(label) > 1:
            raise ConfigError(f"{label} is named twice", "give each server a name of its own: --url NAME=URL")


def check_urls(targets: Sequence[Target]) -> list[str]:
    """The models that the URLs among `targets` serve; ConfigError for the first that does not say, before any case."""
    models = []
    for target in targets:
        if isinstance(target, UrlTarget):
            try:
                models.append(target.start()[0].model)
            except TesseraError as error:
                raise ConfigError(f"--url {target.label}: {error.message}", error.hint) from None
    return models


def url_targets(words: Sequence[str]) -> list[UrlTarget]:
    """What `--url NAME=URL`, given several times, names; their key is TESSERA_API_KEY's. ConfigError for no URL."""
    targets = []
    for word in words:
        found = re.fullmatch(r"(?:([^=/]+)=)?(https?://[^\s/]+.*)", word)
        if not found:
            raise ConfigError(f"--url {word!r} is no NAME=URL", "use --url vllm=http://127.0.0.1:8000/v1")
        targets.append(UrlTarget(found[1] or urlsplit(found[2]).netloc, found[2], os.environ.get("TESSERA_API_KEY")))
    return targets
