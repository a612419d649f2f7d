"""The published Python clients, as they are, against a cluster: their results equal those of a
dictionary, or are an error.

    python.py ESKER            starts `ESKER playground`, and stops it

Run by `make clients`, which installs the packages `tikv-client` 0.0.4 and `tikv-python` 0.1.1 into
an environment of their own. Not a part of `make test`, which needs no network.
"""

import asyncio
import json
import random
import subprocess
import sys

import tikv
import tikv_client

MAX_KEY = 8 << 10
SEED = 42
OPERATIONS = 300

# Keys at both ends of the key space, of all lengths, in several scripts.
EDGES = [
    b"\0",
    b"\0\0",
    b"\0" * MAX_KEY,
    "schlüssel/鍵/🔑".encode(),
    b"\xff",
    b"\xff" * (MAX_KEY - 1),
    b"\xff" * MAX_KEY,
]
# The bounds of key spaces, in the form that regions have.
KEY_SPACES = [b"r\0\0\0", b"r\0\0\1", b"x\0\0\0", b"x\0\0\1"]


def crc64(data):
    """CRC-64/XZ, bit by bit."""
    crc = (1 << 64) - 1
    for byte in data:
        crc ^= byte
        for _ in range(8):
            crc = crc >> 1 ^ (0xC96C5795D7870F42 if crc & 1 else 0)
    return crc ^ (1 << 64) - 1


class Cluster:
    def __init__(self, esker):
        self.esker = esker
        self.process = subprocess.Popen(
            [esker, "playground", "--port", "0"], stdout=subprocess.PIPE, text=True
        )
        for line in self.process.stdout:
            if line.startswith("ready: placement at "):
                self.address = line.split()[-1]
                return
        raise SystemExit("the cluster did not start")

    def run(self, *command):
        subprocess.run(
            [self.esker, *command, "--placement", self.address], check=True, capture_output=True
        )

    def split(self, keys):
        """Cuts the regions at keys, with the client that Esker brings along."""
        for key in keys:
            text = "".join(f"\\x{byte:02x}" for byte in key)
            found = subprocess.run(
                [self.esker, "region", "key", text, "--json", "--placement", self.address],
                check=True, capture_output=True, text=True,
            )
            self.run("region", "split", str(json.loads(found.stdout)[0]["id"]), "--key", text)

    def stop(self):
        self.process.terminate()
        assert self.process.wait(60) == 0, "the cluster did not stop well"


def expected(model, lower, upper, limit=None, reverse=False):
    found = sorted((k, v) for k, v in model.items() if lower <= k and (not upper or k < upper))
    if reverse:
        found.reverse()
    return found[:limit]


def a_key(chance):
    if chance.random() < 0.15:
        return chance.choice(EDGES)
    return f"k/{chance.randrange(300):03}".encode()


def a_range(chance):
    lower, upper = sorted([a_key(chance), a_key(chance)])
    return lower, upper if chance.random() < 0.8 else b""


def pure_python(cluster):
    """The package tikv-python."""
    chance, model = random.Random(SEED), {}
    with tikv.RawClient([cluster.address], timeout=20) as client:
        client.delete_range(b"")
        for step in range(OPERATIONS):
            key, value = a_key(chance), f"{step}".encode() * chance.randrange(4)
            lower, upper = a_range(chance)
            match chance.randrange(10):
                case 0 | 1 | 2:
                    client.put(key, value, ttl=chance.choice([None, 100_000]))
                    model[key] = value
                case 3:
                    items = {a_key(chance): value for _ in range(20)}
                    client.put_many(items)
                    model |= items
                case 4:
                    client.delete_many([key])
                    model.pop(key, None)
                case 5:
                    assert client.get(key) == model.get(key)
                    keys = [a_key(chance) for _ in range(20)]
                    assert client.get_many(keys) == {k: model[k] for k in keys if k in model}
                case 6 | 7:
                    reverse, limit = chance.random() < 0.5, chance.choice([None, 1, 7])
                    found = list(client.scan(lower, upper or None, limit=limit, reverse=reverse))
                    wanted = expected(model, lower, upper, limit, reverse)
                    assert found == wanted, (lower, upper, limit, reverse, found, wanted)
                case 8:
                    sum = client.checksum(lower, upper or None)
                    pairs = expected(model, lower, upper)
                    xor = 0
                    for pair in pairs:
                        xor ^= crc64(pair[0] + pair[1])
                    size = len(b"".join(key + value for key, value in pairs))
                    assert tuple(sum) == (xor, len(pairs), size), (sum, xor, len(pairs), size)
                case 9 if chance.random() < 0.2:
                    client.delete_range(lower, upper or None)
                    for key, _ in expected(model, lower, upper):
                        del model[key]
        assert list(client.scan()) == expected(model, b"", b"")
        assert list(client.scan(reverse=True)) == expected(model, b"", b"", reverse=True)
        for too_long in [b"k" * (MAX_KEY + 1), b""]:
            for attempt in [lambda: client.put(too_long, b"v"), lambda: client.get(too_long)]:
                try:
                    attempt()
                except tikv.TiKVError as error:
                    assert "\n" not in str(error), error
                else:
                    raise AssertionError(f"a key of {len(too_long)} bytes was taken")
    with tikv.RawClient([cluster.address], atomic=True) as client:
        client.delete(b"swap")
        assert client.compare_and_swap(b"swap", None, b"1").swapped
        result = client.compare_and_swap(b"swap", b"2", b"3")
        assert (result.swapped, result.previous) == (False, b"1"), result
        assert client.compare_and_swap(b"swap", b"1", b"3").swapped
        assert client.get(b"swap") == b"3"


async def bindings(cluster):
    """The package tikv-client, which is a part of an old Rust client."""
    chance, model = random.Random(SEED), {}
    client = await tikv_client.asynchronous.RawClient.connect([cluster.address])
    await client.delete_range(b"", None)
    refused = 0
    for step in range(OPERATIONS):
        key, value = a_key(chance), f"{step}".encode() * chance.randrange(4)
        lower, upper = a_range(chance)
        match chance.randrange(8):
            case 0 | 1:
                await client.put(key, value)
                model[key] = value
            case 2:
                items = {a_key(chance): value for _ in range(20)}
                await client.batch_put(items)
                model |= items
            case 3:
                await client.batch_delete([key])
                model.pop(key, None)
            case 4:
                assert await client.get(key) == model.get(key)
                keys = [a_key(chance) for _ in range(20)]
                found = dict(await client.batch_get(keys))
                assert found == {k: model[k] for k in keys if k in model}
            case 5 | 6:
                limit = chance.choice([1, 7, 1000])
                try:
                    found = await client.scan(lower, upper or None, limit)
                except Exception as error:
                    refused += 1
                    print("   refused:", str(error)[:150])
                    continue
                wanted = expected(model, lower, upper, limit)
                assert [(bytes(k), bytes(v)) for k, v in found] == wanted, (
                    lower[:20], upper[:20], limit, len(found), len(wanted))
            case 7 if chance.random() < 0.2:
                await client.delete_range(lower, upper or None)
                for key, _ in expected(model, lower, upper):
                    del model[key]
    for too_long in [b"k" * (MAX_KEY + 1), b""]:
        try:
            await client.put(too_long, b"v")
        except Exception as error:
            assert str(error), error
        else:
            raise AssertionError(f"a key of {len(too_long)} bytes was taken")
    return refused


async def outdated(cluster):
    """A scan by the package tikv-client that knows the regions as they were."""
    client = await tikv_client.asynchronous.RawClient.connect([cluster.address])
    await client.batch_put({f"o/{number}".encode(): b"v" for number in range(9)})
    assert len(await client.scan(b"o/", b"o0", 100)) == 9
    cluster.split([b"o/5"])
    try:
        found = await client.scan(b"o/", b"o0", 100)
    except Exception as error:
        # The client does not look the region up again for a scan, but for anything
        # else.
        print("  tikv-client said of a scan over a region that was split:", str(error)[:200])
        assert await client.get(b"o/4") == b"v" and await client.get(b"o/5") == b"v"
        found = await client.scan(b"o/", b"o0", 100)
    assert len(found) == 9, found


def main():
    cluster = Cluster(sys.argv[1])
    try:
        for state in ["fresh", "with the bounds of key spaces", "of 100 regions"]:
            if state == "with the bounds of key spaces":
                cluster.split(key + b"\0\0\0\0\xfb" for key in KEY_SPACES)
            if state == "of 100 regions":
                cluster.split(f"k/{number * 3:03}".encode() for number in range(100))
            print(f"a cluster {state}:")
            pure_python(cluster)
            print("  tikv-python answers as a dictionary would")
            refused = asyncio.run(bindings(cluster))
            print(f"  tikv-client answers as a dictionary would; {refused} scans were refused")
        asyncio.run(outdated(cluster))
    finally:
        cluster.stop()


main()
