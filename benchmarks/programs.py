"""What compiled programs do, counted in their text: bytes that devices exchange, steps of loops."""

import re

SIZES = {"f64": 8, "f32": 4, "f16": 2, "bf16": 2, "s64": 8, "u64": 8, "s32": 4, "u32": 4, "pred": 1}
EXCHANGES = ("all-reduce", "all-gather", "reduce-scatter", "all-to-all", "collective-permute")
CALLED = re.compile(r"(?:calls|to_apply|body|condition)=%?([\w.\-]+)")
TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')


def computations(text):
    """({name: its lines}, the name of the one that is entered)."""
    found, name, entry = {}, None, None
    for line in text.splitlines():
        head = re.match(r"(ENTRY )?%?([\w.\-]+) \(.*\{$", line.strip())
        if head:
            name = head[2]
            found[name] = []
            entry = name if head[1] else entry
        elif name is not None:
            found[name].append(line.strip())
    return found, entry


def _size(shapes):
    total = 0
    for kind, axes in re.findall(r"(\w+)\[([\d,]*)\]", shapes):
        count = 1
        for axis in filter(None, axes.split(",")):
            count *= int(axis)
        total += SIZES.get(kind, 0) * count
    return total


def exchanged(text):
    """{kind: bytes that a device gets by it}, a loop without a known end counted once."""
    known, entry = computations(text)

    def of(name):
        total = dict.fromkeys(EXCHANGES, 0)
        for line in known.get(name, ()):
            for kind in EXCHANGES:
                if found := re.search(rf"= (.*?) {kind}(?:-start)?\(", line):
                    total[kind] += _size(found[1])
            trips = int(found[1]) if (found := TRIPS.search(line)) else 1
            called = CALLED.findall(line)
            branches = re.search(r"branch_computations=\{(.*?)\}", line)
            called += [] if branches is None else re.findall(r"[\w.\-]+", branches[1])
            for inner in called:
                for kind, count in of(inner).items():
                    total[kind] += trips * count
        return total

    return of(entry)


def iterations(text):
    """Iterations of all loops in a row, those inside of loops multiplied."""
    known, entry = computations(text)

    def of(name):
        total = 0
        for line in known.get(name, ()):
            inner = sum(map(of, CALLED.findall(line)))
            found = TRIPS.search(line)
            total += inner if found is None else int(found[1]) * max(inner, 1)
        return total

    return of(entry)
