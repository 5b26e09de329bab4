"""Words that prompts of text are drawn from."""

from __future__ import annotations

_TEXT = (
    "time year people way day man thing woman life child world school state family student group country problem hand "
    "part place case week company system program question work government number night point home water room mother "
    "area money story fact month lot right study book eye job word business issue side kind head house service friend "
    "father power hour game line end member law car city community name president team minute idea kid body back"
)
WORDS = _TEXT.split()
"""Common English words, a token each in most vocabularies."""
