"""Behaviour of all commands: bad input ends in one line and exit code 2; a launcher's arguments are accepted."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import functools
import gc
import os
import sys
from collections.abc import Callable, Iterator
from typing import Any, NoReturn

from mmpeft_ds import stop
from mmpeft_ds.errors import BadInput, printable
from mmpeft_ds.files import cannot_write
from mmpeft_ds.output import outlive_readers
from mmpeft_ds.quiet import quiet
from mmpeft_ds.redaction import mask_output, masked
from mmpeft_ds.registration import when_imported
from mmpeft_ds.unused_imports import stand_in

# What gloo and NCCL say when a rank that they wait for is gone.
LOST_A_RANK = ("gloo/transport/", "remote process exited")
NO_MEMORY = "DefaultCPUAllocator: can't allocate memory"  # torch raises it as a RuntimeError
PATIENCE = datetime.timedelta(seconds=5)  # how long other ranks wait for rank 0 to speak first


class Parser(argparse.ArgumentParser):
    """argparse whose errors are one line, and which takes the `--local_rank` that launchers add."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=argparse.RawDescriptionHelpFormatter, **kwargs)
        # The `deepspeed` launcher appends it; the environment variable is what we use.
        self.add_argument("--local_rank", "--local-rank", type=int, default=0, help=argparse.SUPPRESS)

    def error(self, message: str) -> NoReturn:
        """One line instead of the usage text."""
        raise BadInput(f"{self.prog}: {message}. See {self.prog} --help.")


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run a command and leave with its exit code: 0 done, 2 bad input or a file that cannot be written (one line, no
    traceback), 1 a fault of ours or a rank that is gone (which is one line as well).
    """
    quiet()
    outlive_readers()
    mask_output()
    with stop.watching() as watch:  # first of all, since the launcher may end during the imports of `main`
        try:
            code = _code_of(main, watch)
        except Exception as error:
            if "TORCHELASTIC_ERROR_FILE" in os.environ:  # where torchrun and supervise.py look for the reason
                from torch.distributed.elastic.multiprocessing.errors import get_error_handler

                get_error_handler().record_exception(error)
            raise
        sys.exit(code)


def _code_of(main: Callable[[], int | None], watch: stop.Watch) -> int:
    try:
        code = main() or 0
    except BadInput as e:
        if _speaks():
            sys.stdout.flush()
            print(f"error: {masked(str(e))}", file=sys.stderr, flush=True)
        code = 2
    except KeyboardInterrupt:
        print(f"stopped ({watch.reason or 'SIGINT'})", file=sys.stderr, flush=True)
        code = watch.signal_code or 130
    except OSError as e:
        if not (reason := cannot_write(e)):
            raise
        sys.stdout.flush()
        where = printable(str(e.filename or "a file of this command"))
        print(f"error: {masked(where)}: {reason}", file=sys.stderr, flush=True)
        code = 2
    except (MemoryError, RuntimeError) as e:
        if isinstance(e, MemoryError) or NO_MEMORY in str(e):
            if _speaks():
                what = f" ({str(e).splitlines()[0][:200]})" if str(e) else ""
                print(f"error: not enough memory on this machine{what}. Is a number of the recipe too large?",
                      file=sys.stderr, flush=True)  # fmt: skip
            sys.exit(2)
        if not (_of_the_store(e) or any(sign in str(e) for sign in LOST_A_RANK)):
            raise
        sys.stdout.flush()
        missing = watch.lost() or watch.stuck()
        print(
            f"rank {rank()}: lost its connection to {missing or 'another rank, which has probably died'}. The reason "
            "is what that rank printed last, or the kernel's log if it was killed. The same command continues from "
            f"the last checkpoint. ({str(e).splitlines()[0]})",
            file=sys.stderr,
            flush=True,
        )
        code = 1
    return code


@contextlib.contextmanager
def quick_imports(compiles: bool = False) -> Iterator[None]:
    """For imports that take seconds.

    A fifth of that is the garbage collector, which finds nothing in new modules; `_read_index_once` saves a tenth, and
    `unused_imports` a quarter, which MMPEFT_REAL_IMPORTS=1 switches off.

    Args:
        compiles: whether `torch.compile` will be used; then torch's compiler is imported at once, where libraries do.
    """
    if "torch" in sys.modules or not gc.isenabled():
        yield
        return
    when_imported("transformers.utils.import_utils", _read_index_once, at_once=True)
    when_imported("torch.utils._triton", _leave_triton_out, at_once=True)
    if not compiles and os.environ.get("MMPEFT_REAL_IMPORTS", "0") in ("", "0"):
        when_imported("torch", stand_in, at_once=True)
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()  # modules stay, so that later collections need not look at them
        gc.enable()


def _read_index_once() -> None:
    """Let transformers keep all that it reads of its model files on import.

    It asks for the list twice, and its own memo has room for a quarter of the folders, so that all are read twice
    (`findings/transformers_reads_model_files_twice.sh`).
    """
    utils = sys.modules["transformers.utils.import_utils"]
    utils.create_import_structure_from_path = functools.cache(utils.create_import_structure_from_path.__wrapped__)


def _leave_triton_out() -> None:
    """Let a torch that was built for the CPU take triton as absent, which has no use for it: it would import it to
    know, which takes 70 MiB and a fifth of a second."""
    version = sys.modules["torch.version"]
    if not any(getattr(version, kind, None) for kind in ("cuda", "hip", "xpu")):
        sys.modules["torch.utils._triton"].has_triton_package = lambda: False


def rank() -> int:
    """Rank of this process from the launcher's environment (deepspeed and torchrun, Slurm, mpirun), 0 without one."""
    names = ("RANK", "SLURM_PROCID", "OMPI_COMM_WORLD_RANK", "PMI_RANK")
    given = next((os.environ[name] for name in names if os.environ.get(name)), "0")
    return int(given) if given.isdecimal() else 0  # what is no number is refused when the ranks meet


def one_machine() -> bool:
    """Whether all ranks are known to be on this machine, from the environment of deepspeed or torchrun, or since there
    is one alone. False where nobody says so, as under srun and mpirun."""
    ranks = os.environ.get("WORLD_SIZE")
    here = os.environ.get("LOCAL_WORLD_SIZE", os.environ.get("LOCAL_SIZE"))
    if ranks is None:
        return not any(name in os.environ for name in ("SLURM_STEP_NUM_TASKS", "OMPI_COMM_WORLD_SIZE", "PMI_SIZE"))
    return ranks == "1" or ranks == here


def score_table(scores: dict[str, float], baselines: dict[str, float], title: str) -> None:
    """Print `score_text`."""
    print(score_text(scores, baselines, title))


def score_text(scores: dict[str, float], baselines: dict[str, float], title: str) -> str:
    """The scores of a run beside those that need no model, as a table with a line per metric.

    Args:
        scores: of a task; the first key is its overall metric and a prefix of those by kind.
        baselines: NAME and NAME_KIND, which stand beside that metric and the same kinds, or NAME_METRIC.
    """
    import io

    from rich.console import Console
    from rich.table import Table

    columns = _by_name(scores, baselines)
    table = Table(title=one_line(title), title_justify="left")
    table.add_column("")
    for name in (*columns, "this run"):
        table.add_column(name.replace("_", " "), justify="right", style="bold" if name == "this run" else None)
    for metric, value in scores.items():
        values = (*(column.get(metric) for column in columns.values()), value)
        table.add_row(metric, *("-" if v is None else f"{v:.4f}" for v in values))
    text = io.StringIO()
    Console(file=text, width=max(80, len(title))).print(table)
    return text.getvalue().rstrip("\n")


def one_line(title: str) -> Any:
    """Title of a rich table that stays on one line where the table is narrower."""
    from rich.text import Text

    return Text(title, style="table.title", no_wrap=True, overflow="ignore")


def _by_name(scores: dict[str, float], baselines: dict[str, float]) -> dict[str, dict[str, float]]:
    """Baseline -> metric -> value."""
    main = next(iter(scores), "")
    named = {key: max((m for m in scores if key.endswith(f"_{m}")), key=len, default="") for key in baselines}
    kinds = [key for key, metric in named.items() if not metric]
    names = [key for key in kinds if not any(key.startswith(f"{other}_") for other in kinds)]
    columns: dict[str, dict[str, float]] = {}
    for key, metric in named.items():
        name = key.removesuffix(f"_{metric}") if metric else next(n for n in names if f"{key}_".startswith(f"{n}_"))
        # `majority_yes_no` stands beside `accuracy_yes_no`
        columns.setdefault(name, {})[metric or main + key.removeprefix(name)] = baselines[key]
    return columns


def _speaks() -> bool:
    """Rank 0 reports an error that all ranks have; the first of the others reports one that rank 0 does not have."""
    store = _store()
    if rank() == 0:
        if store is not None:
            with contextlib.suppress(Exception):
                store.set("mmpeft_ds/rank_0_failed", "1")
        return True
    if store is None:
        # Before the ranks meet, those of a node read the same files: one line per node.
        return os.environ.get("LOCAL_RANK", os.environ.get("SLURM_LOCALID")) == "0"
    try:
        store.wait(["mmpeft_ds/rank_0_failed"], PATIENCE)
    except _distributed().DistStoreError:  # the time is up: rank 0 has not failed
        return store.add("mmpeft_ds/others_failed", 1) == 1
    except Exception:  # the store lives on rank 0, which has left and spoken already
        return False
    return False


def _of_the_store(error: Exception) -> bool:
    """Whether the connection to rank 0, which serves the ranks' store, has failed, as while a group is made."""
    distributed = _distributed()
    return distributed is not None and isinstance(error, (distributed.DistNetworkError, distributed.DistStoreError))


def _distributed() -> Any:
    """torch.distributed if something has imported torch; a command that fails early does not wait for it."""
    torch = sys.modules.get("torch")
    return torch.distributed if torch is not None and torch.distributed.is_available() else None


def _store() -> Any:
    """The store in which the ranks leave notes for each other, once they have met."""
    distributed = _distributed()
    if distributed is None or not distributed.is_initialized():
        return None
    return distributed.distributed_c10d._get_default_store()
