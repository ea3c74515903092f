"""What a check found, and the report of all of them: as plain data, as text and as HTML."""

from __future__ import annotations

import html
import textwrap
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, Literal

if TYPE_CHECKING:
    from collections.abc import Sequence

    from labkit.hypervisors.accelerator import Tier

__all__ = ["Check", "Report", "Status"]

Status = Literal["ok", "info", "warn", "fail"]

_SYMBOLS: dict[Status, str] = {"ok": "✓", "info": "·", "warn": "!", "fail": "✗"}
_TIERS: dict[Tier, str] = {
    "kvm": "Machines run with KVM: the processor runs them directly, at nearly full speed.",
    "tcg": "Machines run with TCG: QEMU translates their code. All of the course works, slower.",
    "none": "No machine can run here yet: mend what has failed below.",
}


@dataclass(frozen=True)
class Check:
    """One thing that was looked at.

    Attributes:
        id: its name, which does not change: "accelerator-kvm".
        status: "ok", "info", "warn" or "fail"; see the module's docstring.
        seen: the evidence.
        meaning: what that means for the course, in a sentence.
        mend: what to do, commands in backticks; "" where the status is "ok".
    """

    id: str
    status: Status
    seen: str
    meaning: str
    mend: str = ""

    def as_dict(self) -> dict[str, str]:
        """The fields as plain data."""
        return {
            "id": self.id,
            "status": self.status,
            "seen": self.seen,
            "meaning": self.meaning,
            "mend": self.mend,
        }


@dataclass(frozen=True, kw_only=True)
class Report:
    """What the doctor found; shows itself in notebooks and terminals.

    Attributes:
        tier: "kvm", "tcg" or "none": what machines can run with.
        checks: in the order in which one would read them.
        seconds: how long it took.
    """

    tier: Tier
    checks: tuple[Check, ...]
    seconds: float

    @property
    def ok(self) -> bool:
        """True where nothing failed."""
        return all(check.status != "fail" for check in self.checks)

    def __getitem__(self, id: str) -> Check:
        for check in self.checks:
            if check.id == id:
                return check
        raise KeyError(id)

    def as_dict(self) -> dict[str, Any]:
        """`{"tier", "checks": [{"id", "status", "seen", "meaning", "mend"}]}`."""
        return {"tier": self.tier, "checks": [check.as_dict() for check in self.checks]}

    def __str__(self) -> str:
        lines = [_TIERS[self.tier], ""]
        for check in self.checks:
            lines += _as_text(check)
        return "\n".join([*lines, "", _summary(self.checks)])

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:  # IPython's protocol
        printer.text(str(self))

    def _repr_html_(self) -> str:
        rows = "".join(_as_row(check) for check in self.checks)
        return (
            f"<style>{_CSS}</style><div class='labkit-doctor'>"
            f"<p><strong>{_rich(_TIERS[self.tier])}</strong></p>"
            "<table><thead><tr><th>check</th><th>status</th><th>what was seen, and what it means</th></tr>"
            f"</thead><tbody>{rows}</tbody></table><p>{_rich(_summary(self.checks))}</p></div>"
        )


def _summary(checks: Sequence[Check]) -> str:
    count = {status: sum(check.status == status for check in checks) for status in _SYMBOLS}
    return (
        f"{count['ok']} ok, {count['info']} to know or optional, {count['warn']} with a warning, "
        f"{count['fail']} failed."
    )


def _as_text(check: Check) -> list[str]:
    indent = " " * 8
    wrap = partial(textwrap.wrap, width=100, subsequent_indent=indent, break_long_words=False)
    wrap = partial(wrap, break_on_hyphens=False)
    lines = [f"{_SYMBOLS[check.status]} {check.status:<4}  {check.id}"]
    lines += wrap(check.seen, initial_indent=indent)
    lines += wrap(check.meaning, initial_indent=indent)
    if check.mend:
        lines += wrap(f"→ {check.mend}", initial_indent=indent, subsequent_indent=indent + "  ")
    return lines


def _as_row(check: Check) -> str:
    mend = f"<div class='mend'>→ {_rich(check.mend)}</div>" if check.mend else ""
    seen = f"<div class='seen'>{html.escape(check.seen)}</div>"
    return (
        f"<tr class='{check.status}'><td class='id'>{html.escape(check.id)}</td>"
        f"<td class='status'><span>{_SYMBOLS[check.status]}&nbsp;{check.status}</span></td>"
        f"<td><div>{_rich(check.meaning)}</div>{seen}{mend}</td></tr>"
    )


def _rich(text: str) -> str:
    """Text as HTML, what stands in backticks as code."""
    parts = text.split("`")
    if len(parts) % 2 == 0:  # a backtick without its fellow is just a character
        return html.escape(text)
    return "".join(
        f"<code>{html.escape(part)}</code>" if index % 2 else html.escape(part)
        for index, part in enumerate(parts)
    )


# `div.` outweighs JupyterLab's own rules, which make equal columns.
# No colour is fixed against the page: text keeps the theme's, tints are transparent. Status is a word.
_CSS = """
div.labkit-doctor table { border-collapse: collapse; width: 100%; max-width: 62em;
  table-layout: auto; margin: 0; font-size: 0.95em; }
div.labkit-doctor th, div.labkit-doctor td { text-align: left !important; vertical-align: top;
  padding: 0.5em 0.8em; white-space: normal; line-height: 1.4;
  border-bottom: 1px solid rgba(128, 128, 128, 0.3); }
div.labkit-doctor thead th { font-weight: 600; border-bottom-width: 2px; }
div.labkit-doctor tbody tr { background: none !important; }
div.labkit-doctor .id { font-weight: 600; white-space: nowrap; }
div.labkit-doctor .status { white-space: nowrap; }
div.labkit-doctor .status span { display: inline-block; min-width: 3.6em; padding: 0.05em 0.5em;
  border-radius: 0.3em; border: 1px solid rgba(128, 128, 128, 0.5); }
div.labkit-doctor .ok span { background: rgba(46, 160, 67, 0.18); border-color: rgba(46, 160, 67, 0.7); }
div.labkit-doctor .warn span { background: rgba(210, 153, 34, 0.22); border-color: rgba(210, 153, 34, 0.9); }
div.labkit-doctor .fail span { background: rgba(218, 54, 51, 0.22); border-color: rgba(218, 54, 51, 0.9); }
div.labkit-doctor .seen { opacity: 0.75; font-size: 0.92em; margin-top: 0.15em; overflow-wrap: anywhere; }
div.labkit-doctor .mend { margin-top: 0.35em; }
div.labkit-doctor code { padding: 0.05em 0.3em; border-radius: 0.25em; background: rgba(128, 128, 128, 0.18);
  color: inherit; overflow-wrap: anywhere; }
"""
