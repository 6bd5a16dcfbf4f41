import io
import re
import threading

from rich.console import Console

from distill_system.observe.live import LiveView, format_duration, format_number


def build_plain_view(interval: float = 0.0) -> tuple[LiveView, io.StringIO]:
    output = io.StringIO()
    console = Console(file=output, width=20)
    return LiveView("run", console=console, plain_interval_seconds=interval), output


def test_a_plain_line_says_stage_step_values_rate_and_time_left() -> None:
    view, output = build_plain_view()
    with view:
        task = view.start("distill", 200)
        task.update(50, {"tok/s": 5230.4, "on-policy distance": 0.01234, "off-policy": 0.0101})
        task.finish()
    first, last = output.getvalue().splitlines()
    assert re.fullmatch(
        r"\[distill\] step 50/200  on-policy distance 0\.0123  off-policy 0\.0101  "
        r"5,230 tok/s  ETA \d+:\d\d",
        first,
    )
    assert "done in 0:00" in last


def test_plain_output_has_no_control_characters_and_no_markup() -> None:
    view, output = build_plain_view()
    with view:
        view.note("teacher [bold]starts[/bold]")
        view.start("sft_teacher", 2).update(1, {"loss": float("nan")})
    assert "teacher [bold]starts[/bold]\n" in output.getvalue()
    assert "loss nan" in output.getvalue()
    assert not re.search(r"[\x00-\x09\x0b-\x1f\x7f]", output.getvalue())


def test_plain_lines_are_seconds_apart_but_the_last_one_is_never_left_out() -> None:
    view, output = build_plain_view(interval=60.0)
    with view:
        task = view.start("distill", 100)
        for step in range(1, 101):
            task.update(step, {})
        task.finish()
        view.start("sft", 10).update(1, {})
    lines = output.getvalue().splitlines()
    assert [line.split("  ")[0] for line in lines[:2]] == [
        "[distill] step 1/100",
        "[distill] step 100/100",
    ]


def test_a_stage_that_did_not_finish_says_how_far_it_came() -> None:
    view, output = build_plain_view(interval=60.0)
    with view:
        task = view.start("distill", 100)
        task.update(1, {})
        task.update(37, {})
    assert output.getvalue().splitlines()[-1].startswith("[distill] step 37/100")


def test_a_resumed_stage_reckons_its_time_left_from_where_it_began() -> None:
    view, _ = build_plain_view()
    task = view.start("distill", 200, first_step=190)
    assert task.remaining_seconds is None
    task.update(195, {})
    assert task.remaining_seconds is not None
    assert task.remaining_seconds <= 1.5 * task.elapsed_seconds  # 5 of 10 done, not 195 of 200


def test_a_terminal_gets_a_panel_with_both_stages_from_two_threads() -> None:
    output = io.StringIO()
    console = Console(file=output, force_terminal=True, width=120)
    with LiveView("quickstart", console=console) as view:

        def work(stage: str) -> None:
            task = view.start(stage, 50)
            for step in range(1, 51):
                task.update(step, {"loss": 1.0 / step})
            task.finish()

        threads = [threading.Thread(target=work, args=(f"sft_{role}",)) for role in ("t", "s")]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    last_panel = output.getvalue().rpartition("quickstart")[2]
    assert "sft_t" in last_panel
    assert "sft_s" in last_panel
    assert last_panel.count("50/50") == 2


def test_numbers_and_durations_are_short() -> None:
    numbers = [5230.4, 0.01234, 2.5, 0.0, 1.234e-5, -41.26]
    assert [format_number(value) for value in numbers] == [
        "5,230",
        "0.0123",
        "2.5",
        "0",
        "1.2e-05",
        "-41.3",
    ]
    assert [format_duration(s) for s in (0.2, 42, 725, 3723)] == [
        "0:00",
        "0:42",
        "12:05",
        "1:02:03",
    ]
