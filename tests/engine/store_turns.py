"""A second engine on the same store: says "ready", waits for a line, stores 30 turns, tells their ids."""

import sys
from pathlib import Path

from kv_agent.storage.catalog import Catalog
from tests.engine import support


def main() -> None:
    store = Path(sys.argv[1])
    engine = support.open_engine(store)
    catalog = Catalog(store / "catalog.sqlite3")
    story = support.encode(engine, support.STORY)
    print("ready", flush=True)
    sys.stdin.readline()
    turn_ids = [
        support.run(engine, story[i : i + 90], max_tokens=1, scope=support.scope("theirs")).turn_id
        for i in range(30)
    ]
    for turn_id in turn_ids:
        support.wait_stored(catalog, turn_id)
    print("stored", *turn_ids, flush=True)
    catalog.close()
    engine.close()


if __name__ == "__main__":
    main()
