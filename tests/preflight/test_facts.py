"""What a process finds on its node: imports that fail in any way, the network card, room."""

from __future__ import annotations

import ctypes
import os
import socket
import time
from functools import partial

import psutil
import pytest

from mmpeft_ds.preflight import facts, imports


@pytest.fixture
def modules(tmp_path, monkeypatch):
    """Modules by their source, for children of this process."""
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(**sources: str) -> tuple[str, ...]:
        for name, source in sources.items():
            (tmp_path / f"{name}.py").write_text(source)
        return tuple(sources)

    return write


def test_an_import_that_fails_is_told_and_the_next_ones_are_tried(modules):
    names = modules(odd_good="__version__ = '1.2'", odd_bad="raise OSError('libfoo.so: cannot open')", odd_last="")
    versions, failed = imports.Probe(names).result(60)
    assert versions == {"odd_good": "1.2", "odd_last": ""}
    assert failed == {"odd_bad": "OSError: libfoo.so: cannot open"}


def test_an_import_that_ends_the_process_ends_a_child_alone(modules):
    names = modules(odd_first="", odd_kills="import os, signal; os.kill(os.getpid(), signal.SIGKILL)", odd_never="")
    versions, failed = imports.Probe(names).result(60)
    assert versions == {"odd_first": ""} and failed == {"odd_kills": "importing it ended the process (signal 9)"}


def test_an_import_that_hangs_is_given_up(modules):
    waited = []
    probe = imports.Probe(modules(odd_hangs="import time; time.sleep(1000)"))
    versions, failed = probe.result(0.3, lambda: waited.append(1))
    assert not versions and failed == {"odd_hangs": "importing it was not done within 0.3 s"} and waited
    assert not psutil.pid_exists(probe.child)


@pytest.mark.parametrize("slow", [False, True], ids=["asked in time", "ended before the child could ask for it"])
def test_a_rank_that_ends_early_leaves_no_child(slow, modules, monkeypatch):
    """Such as one that cannot reach the others."""
    names = modules(odd_hangs="import time; time.sleep(1000)")
    reading, writing = os.pipe()
    rank = os.fork()
    if rank == 0:
        if slow:
            monkeypatch.setattr(imports.ctypes, "CDLL", partial(_library_once_orphaned, os.getpid(), ctypes.CDLL))
        os.write(writing, str(imports.Probe(names).child).encode())
        os._exit(2)
    os.waitpid(rank, 0)
    child, end = int(os.read(reading, 20)), time.monotonic() + 60
    while psutil.pid_exists(child) and psutil.Process(child).status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.01)


def _library_once_orphaned(parent: int, open_library, name):
    """`open_library(name)` as soon as this process is no longer a child of `parent`."""
    while os.getppid() == parent:
        time.sleep(0.01)
    return open_library(name)


@pytest.fixture
def network(monkeypatch):
    """A host `node7` with two cards and a name that leads to one of the addresses."""

    class Address:
        family = socket.AF_INET

        def __init__(self, address: str):
            self.address = address

    cards = {"lo": "127.0.0.1", "eth0": "10.0.0.7", "ib0": "10.1.0.7"}
    monkeypatch.setattr(facts.psutil, "net_if_addrs", lambda: {n: [Address(a)] for n, a in cards.items()})
    monkeypatch.setattr(socket, "gethostname", lambda: "node7")
    monkeypatch.delenv("GLOO_SOCKET_IFNAME", raising=False)

    def leads_to(address: str | None) -> None:
        def find(name: str) -> str:
            assert name == "node7"
            if address is None:
                raise socket.gaierror(-2, "Name or service not known")
            return address

        monkeypatch.setattr(socket, "gethostbyname", find)

    return leads_to


def test_the_card_is_the_one_with_the_address_of_the_name(network):
    network("10.1.0.7")
    card = facts.card()
    assert (card["name"], card["address"], card["problem"]) == ("ib0", "10.1.0.7", "")


@pytest.mark.parametrize(
    ("address", "says"),
    [("127.0.1.1", "its name resolves to 127.0.1.1"), ("10.9.9.9", "resolves to 10.9.9.9"), (None, "has no address")],
)
def test_a_name_that_leads_to_no_card_is_a_problem_with_a_remedy(network, address, says):
    network(address)
    problem = facts.card()["problem"]
    assert says in problem and "GLOO_SOCKET_IFNAME" in problem and "(eth0, ib0)" in problem


def test_the_variable_names_the_card(network, monkeypatch):
    network("127.0.1.1")
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib0")
    assert facts.card() == {"name": "ib0", "address": "10.1.0.7", "how": "GLOO_SOCKET_IFNAME", "problem": ""}
    monkeypatch.setenv("GLOO_SOCKET_IFNAME", "ib1")
    assert facts.card()["problem"] == "GLOO_SOCKET_IFNAME=ib1: there is no such network card. There are: eth0, ib0."


def test_two_checkouts_of_one_version_are_told_apart(tmp_path, monkeypatch):
    (tmp_path / "mmpeft_ds").mkdir()
    source = tmp_path / "mmpeft_ds" / "__init__.py"
    source.write_text("a = 1\n")
    monkeypatch.setattr(imports.mmpeft_ds, "__file__", str(source))
    before = imports.ours()
    assert imports.ours() == before
    source.write_text("a = 2\n")
    after = imports.ours()
    assert after != before and after.split(" (")[0] == before.split(" (")[0]
