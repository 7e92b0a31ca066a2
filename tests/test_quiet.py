"""Lines that say nothing are hidden by name; everything else is shown."""

import contextlib
import io
import logging
import sys
import warnings

from mmpeft_ds import quiet


def test_only_the_named_lines_of_stdout_are_left_out(capsys):
    with quiet.without_lines("built successfully"):
        print("DeepSpeed op built successfully")
        print("a line that counts")
        sys.stdout.write("half ")
        sys.stdout.write("a line\n")
    assert capsys.readouterr().out == "a line that counts\nhalf a line\n"


def test_a_last_line_without_an_end_is_shown(capsys):
    with quiet.without_lines("x"):
        sys.stdout.write("the last")
    assert capsys.readouterr().out == "the last"


def test_a_warning_or_a_line_of_a_logger_that_is_not_named_is_shown():
    out = io.StringIO()
    handler = logging.StreamHandler(out)
    logger = logging.getLogger("DeepSpeed")
    logger.addHandler(handler)
    try:
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter("always")
            quiet.quiet()
            warnings.warn("`is_gradient_checkpointing` is deprecated", FutureWarning, stacklevel=1)
            warnings.warn("something else", FutureWarning, stacklevel=1)
        logger.warning("Setting accelerator to CPU. If you have GPU or other accelerator, ...")
        logger.warning("overflow")
    finally:
        logger.removeHandler(handler)
    assert [str(w.message) for w in seen] == ["something else"]
    assert out.getvalue() == "overflow\n"


def test_loading_weights_shows_no_bar_and_gives_the_hook_back(capsys):
    from transformers.utils import logging as theirs

    from mmpeft_ds.backbones.common.tower_loading import quiet_loading

    with contextlib.redirect_stderr(io.StringIO()) as err, quiet_loading():
        assert list(theirs.tqdm([1, 2], desc="Loading weights")) == [1, 2]
    assert err.getvalue() == ""
    with contextlib.redirect_stderr(io.StringIO()) as err:
        list(theirs.tqdm([1, 2], desc="Loading weights"))
    assert theirs.is_progress_bar_enabled() is False or "Loading weights" in err.getvalue()
