"""Stop strings: found as soon as they are complete, and not a character of them is given out before."""

from __future__ import annotations

from collections.abc import Sequence


class StopStrings:
    """The stop strings of one request, prepared once for all its sequences.

    Each has its failure function (Knuth, Morris, Pratt 1977), so that a character costs the same however long the
    strings are.
    """

    def __init__(self, strings: Sequence[str]) -> None:
        self.strings = sorted(set(strings), key=len, reverse=True)
        self.failures = [_failure_function(string) for string in self.strings]
        self.firsts = frozenset(string[0] for string in self.strings)


class StopMatcher:
    """Text in, text out, until one of the stop strings is complete.

    The match that is complete first wins; of two that end at the same character, the longer. So the outcome does not
    depend on how the text was cut into tokens.
    """

    def __init__(self, stops: StopStrings, *, include: bool) -> None:
        self._stops = stops
        self._include = include
        self._matched_lengths = [0] * len(stops.strings)
        self._held = ""
        self.watches = bool(stops.strings)
        """Whether there is anything to find."""
        self.found: str | None = None
        """The stop string that was found."""

    def feed(self, text: str, *, counts: bool = True) -> str:
        """What may be given out now; all of it, if `found`. A match that ends in a text that does not count is none."""
        if self.found is not None:
            return ""
        if not self._held and self._stops.firsts.isdisjoint(text):
            return text
        whole = self._held + text
        for end, character in enumerate(text, start=len(self._held) + 1):
            match = self._advance(character)
            if match is not None and counts:
                self.found = match
                self._held = ""
                return whole[: end if self._include else end - len(match)]
        keep = max(self._matched_lengths)
        self._held = whole[len(whole) - keep :]
        return whole[: len(whole) - keep]

    def flush(self) -> str:
        """What was held back, at the end of the sequence."""
        held, self._held = self._held, ""
        return held

    def _advance(self, character: str) -> str | None:
        """Take one character into account; the longest stop string that it completes."""
        lengths, match = self._matched_lengths, None
        for i, string in enumerate(self._stops.strings):
            failure, matched = self._stops.failures[i], lengths[i]
            while matched and string[matched] != character:
                matched = failure[matched - 1]
            if string[matched] == character:
                matched += 1
            if matched == len(string):
                match = match or string
                matched = failure[matched - 1]
            lengths[i] = matched
        return match


def _failure_function(string: str) -> list[int]:
    """For each prefix of `string`: the length of its longest proper prefix that is also its suffix."""
    failure, matched = [0] * len(string), 0
    for i in range(1, len(string)):
        while matched and string[i] != string[matched]:
            matched = failure[matched - 1]
        if string[i] == string[matched]:
            matched += 1
        failure[i] = matched
    return failure
