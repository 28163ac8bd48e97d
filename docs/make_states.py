"""Draw the state machine from its table: `make pages` writes docs/reference/states.md anew."""

from pathlib import Path
from typing import Final

from vpn_sentinel.domain.machine import TRANSITIONS, Wait
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import HARM, MEANING, State

PAGE: Final = Path(__file__).parent / "reference" / "states.md"
_HEAD: Final = """\
# States and transitions

Drawn from `vpn_sentinel.domain.machine.TRANSITIONS` by `make pages`; a test keeps this page current.

A row is the state a tunnel is in, a column what comes in: the verdict of a report, or, for *silent*, the deadline that
passed without one. A cell says how long that must last, without a break, before the state changes. An empty cell
changes nothing. The column *unverified* is the verdict *unknown*: nothing could be seen. A good state ages then, and
so does one that was never judged: after *grace unverified* the tunnel is *unverified*, with what could not be seen and
why. A tunnel that was leaking or down stays so, with the same findings added: that nobody can look is no sign of an
end. Sight that is lost three times within five minutes counts as lost, and is back after *flap calm*.

A tunnel that left *protected* three times within five minutes (`VPN_SENTINEL_FLAP_COUNT`, `VPN_SENTINEL_FLAP_WINDOW`)
is flapping: it shows the finding `flapping`, and where the table says *grace recovery*, *flap calm* counts. So the
third outage stays one open incident until there is calm.
"""
_GRACE: Final = """\
| wait | setting | default |
|---|---|---|
"""


def render() -> str:
    """The page's text."""
    stimuli = [s for s in HARM if any(s in row for row in TRANSITIONS.values())]
    lines = [_HEAD, f"| from \\ to | {' | '.join(stimuli)} |", "|---" * (len(stimuli) + 1) + "|"]
    states = [s for s in HARM if s in TRANSITIONS]
    lines += [f"| **{state}** | {' | '.join(_cell(state, s) for s in stimuli)} |" for state in states]
    lines += ["", _GRACE.rstrip()]
    for wait in Wait:
        name = "" if wait is Wait.NONE else f"`VPN_SENTINEL_{wait.value.upper()}`"
        lines.append(f"| {_said(wait)} | {name} | {wait.seconds(Policy()):g} s |")
    lines += ["", "## As a graph", "", "```mermaid", "stateDiagram-v2", f"    [*] --> {State.PENDING}"]
    for state in states:
        lines += [f"    {state} --> {to}: {_said(wait)}" for to, wait in TRANSITIONS[state].items()]
    lines += ["```", "", "## What brings a verdict about", "", "| verdict | findings |", "|---|---|"]
    for state in HARM:
        codes = [f"`{code}`" for code, meaning in MEANING.items() if meaning.state is state]
        if codes:
            lines.append(f"| {state} | {', '.join(codes)} |")
    lines += ["", "The most harmful finding decides. Those of *protected* are told, and change nothing.", ""]
    return "\n".join(lines)


def _cell(state: State, stimulus: State) -> str:
    wait = TRANSITIONS[state].get(stimulus)
    return "" if wait is None else _said(wait)


def _said(wait: Wait) -> str:
    return "at once" if wait is Wait.NONE else wait.value.replace("_", " ")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
