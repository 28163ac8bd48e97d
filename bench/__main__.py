"""`python -m bench [ingest] [agent]`: run the benchmarks that are named, or all."""

import sys
from importlib import import_module

for name in sys.argv[1:] or ("ingest", "agent"):
    print(f"# {name}", flush=True)
    import_module(f"bench.{name}").main([])
