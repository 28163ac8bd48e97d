"""Draw the state machine from its table into docs/reference/states.md, for `make pages`."""

from pathlib import Path
from typing import Final

from vpn_sentinel.domain.machine import TRANSITIONS, Wait
from vpn_sentinel.domain.policy import Policy
from vpn_sentinel.domain.verdict import HARM, MEANING, State

PAGE: Final = Path(__file__).parent / "reference" / "states.md"
_HEAD: Final = """\
# States and transitions

Drawn from `vpn_sentinel.domain.machine.TRANSITIONS` by `make pages`; a test keeps this page current.

A row is the state of a tunnel, a column a stimulus: the verdict of a report, or, for *silent*, a deadline that passed
without one. A cell says how long the stimulus must last, without a break, before the state changes. An empty cell
changes nothing.

The column *unverified* is the verdict *unknown*: nothing could be checked. A good state, or *pending*, becomes
*unverified* after *grace unverified*, with what could not be checked and why. A tunnel that was leaking or down stays
so, with the same findings added: a failed check is no sign of an end. If checks become impossible three times within
five minutes, the tunnel is *unverified* at once, until they have worked for *flap calm*.

A tunnel that left *protected* three times within five minutes (`VPN_SENTINEL_FLAP_COUNT`, `VPN_SENTINEL_FLAP_WINDOW`)
is flapping: it shows the finding `flapping`, and *flap calm* replaces *grace recovery* in the table. So the third
outage stays one open incident until there is calm.
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
        lines.append(f"| {_label(wait)} | {name} | {wait.seconds(Policy()):g} s |")
    lines += ["", "## As a graph", "", "```mermaid", "stateDiagram-v2", f"    [*] --> {State.PENDING}"]
    for state in states:
        lines += [f"    {state} --> {to}: {_label(wait)}" for to, wait in TRANSITIONS[state].items()]
    lines += ["```", "", "## What brings a verdict about", "", "| verdict | findings |", "|---|---|"]
    for state in HARM:
        codes = [f"`{code}`" for code, meaning in MEANING.items() if meaning.state is state]
        if codes:
            lines.append(f"| {state} | {', '.join(codes)} |")
    lines += ["", "The most harmful finding decides. Those of *protected* are shown, and do not change the state.", ""]
    return "\n".join(lines)


def _cell(state: State, stimulus: State) -> str:
    wait = TRANSITIONS[state].get(stimulus)
    return "" if wait is None else _label(wait)


def _label(wait: Wait) -> str:
    return "at once" if wait is Wait.NONE else wait.value.replace("_", " ")


if __name__ == "__main__":
    PAGE.write_text(render(), encoding="utf-8")
