"""`python -m bench [ingest] [agent]`: run the benchmarks that are named, or these two.

`python -m bench situations|soak|detection|pulse|fuzz|siege|endure|kills [options]` runs one that takes long, and passes
its options on.
"""

import sys
from importlib import import_module

SHORT = ("ingest", "agent", "canary")
LONG = {"situations": "bench.situations.run", "soak": "bench.soak", "detection": "bench.detection.run"}
LONG |= {"pulse": "bench.pulse", "fuzz": "bench.fuzz.run", "siege": "bench.siege.run", "endure": "bench.siege.endure"}
LONG |= {"kills": "bench.kills.run"}

if sys.argv[1:2] and sys.argv[1] in LONG:
    import_module(LONG[sys.argv[1]]).main(sys.argv[2:])
elif unknown := set(sys.argv[1:]) - set(SHORT):
    sys.exit(f"{__doc__}\nThere is no benchmark {', '.join(sorted(unknown))}.")
else:
    for name in sys.argv[1:] or ("ingest", "agent"):
        print(f"# {name}", flush=True)
        import_module(f"bench.{name}").main([])
