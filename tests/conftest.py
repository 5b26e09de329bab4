"""What every test shares: measurements of attention are kept in a folder of this run; the logger is as imported."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tessera.log import logger


@pytest.fixture(autouse=True, scope="session")
def _measurements_of_this_run(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(autouse=True)
def _logger_as_imported() -> None:
    """Undo a `log.set_up` by a test before, after which `caplog` would see nothing, or each record twice."""
    logger.handlers.clear()
    logger.propagate = True
    logger.setLevel("NOTSET")
