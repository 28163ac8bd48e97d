"""Running the program as somebody who may nothing, wherever Python and this tree lie."""

import shlex
import sys
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parents[2]


def as_user(uid: int, aside: Path) -> list[str]:
    """Words in front of a command that run it as `uid`, without groups and capabilities. Needs root.

    A Python or a tree below a folder that others may not enter, as /root, is out of reach: in a mount namespace of the
    command's own that folder is empty but for what is needed. `aside` is an empty folder that is below no such one.
    """
    drop = ["setpriv", f"--reuid={uid}", f"--regid={uid}", "--clear-groups", "--bounding-set=-all", "--inh-caps=-all"]
    hidden: dict[Path, list[Path]] = {}
    for place in sorted({Path(p).resolve() for p in (sys.base_prefix, sys.prefix, REPOSITORY)}):
        closed = next((p for p in reversed(place.parents) if not p.stat().st_mode & 0o001), None)
        if closed is not None and not any(place.is_relative_to(kept) for kept in hidden.get(closed, [])):
            hidden.setdefault(closed, []).append(place)
    if not hidden:
        return drop
    steps: list[list[object]] = []
    for home, kept in hidden.items():
        held = {place: aside / str(len(steps) + n) for n, place in enumerate(kept)}
        for there in held.values():
            there.mkdir()
        steps += [["mount", "--bind", place, there] for place, there in held.items()]
        steps += [["mount", "-t", "tmpfs", "-o", "mode=755", "none", home], ["mkdir", "-p", *kept]]
        steps += [["mount", "--move", there, place] for place, there in held.items()]
    script = " && ".join(shlex.join(map(str, step)) for step in steps)
    return ["unshare", "--mount", "sh", "-c", f'{script} && exec "$@"', "sh", *drop]
