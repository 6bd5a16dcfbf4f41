import io
import re
import threading

from rich.console import Console

from distill_system.observe.live import LiveView, format_duration, format_number
from distill_system.records import PoolActivity


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


LINE = (
    "student_rollout bounds the run (97% busy, learner waits 41% of the time for it): "
    "one more worker would bring 1.37x, then teacher_scoring bounds"
)


def build_pools() -> dict[str, PoolActivity]:
    def pool(workers: float, parts: tuple[float, float, float], queued: int = 0) -> PoolActivity:
        busy, blocked, starved = (10 * workers * part for part in parts)
        return PoolActivity(
            num_workers=workers,
            seconds=10.0,
            busy_seconds=busy,
            blocked_seconds=blocked,
            starved_seconds=starved,
            queued=queued,
        )

    return {
        "student_rollout": pool(16, (0.97, 0.0, 0.03), queued=1234),
        "teacher_rollout": pool(1.5, (0.25, 0.5, 0.25)),
        "teacher_scoring": pool(2, (0.7, 0.0, 0.2)),
        "learner": pool(1, (0.59, 0.0, 0.41)),
    }


def record_panel(**console_options: object) -> list[str]:
    """Lines of the last panel with pools, at 80 columns and without colours."""
    output = io.StringIO()
    if encoding := console_options.pop("encoding", None):
        output = io.TextIOWrapper(io.BytesIO(), encoding=str(encoding), newline="")  # type: ignore[assignment]
    console = Console(file=output, force_terminal=True, width=80, color_system=None)
    with LiveView("quickstart", console=console) as view:
        values = {"on-policy distance": 0.0794, "off-policy distance": 0.054, "tok/s": 2013.0}
        view.start("distill", 200).update(50, values)
        view.show_pools(build_pools(), LINE)
    if isinstance(output, io.TextIOWrapper):
        output.flush()
        text = output.buffer.getvalue().decode()
    else:
        text = output.getvalue()
    return text.rpartition("quickstart")[2].splitlines()


def test_the_panel_shows_each_pools_time_and_queue_and_says_what_bounds_the_run() -> None:
    lines = record_panel()
    shown = {line.split()[1]: line for line in lines if " busy" in line and " x" in line}
    assert list(shown) == ["student_rollout", "teacher_rollout", "teacher_scoring", "learner"]
    assert "x16" in shown["student_rollout"]
    assert "97% busy  1,234 wait" in shown["student_rollout"]
    assert "wait" not in shown["learner"]
    bars = {
        name: [line.count(part) for part in "█▒░"]  # busy, blocked, starved, of 24
        for name, line in shown.items()
    }
    assert bars == {
        "student_rollout": [23, 0, 1],
        "teacher_rollout": [6, 12, 6],
        "teacher_scoring": [17, 0, 5],  # a tenth of its time is none of the three
        "learner": [14, 0, 10],
    }
    assert any("█ busy ▒ blocked ░ starved" in line for line in lines)
    text = " ".join(" ".join(line.strip("│ ") for line in lines).split())
    assert LINE in text


def test_the_panel_with_pools_fits_80_columns_and_is_short() -> None:
    lines = [line for line in record_panel() if line.startswith(("│", "╰"))]
    assert {len(line) for line in lines} == {80}
    assert len(lines) <= 12


def test_a_terminal_without_such_characters_gets_bars_of_ascii() -> None:
    lines = record_panel(encoding="ascii")
    learner = next(line for line in lines if "learner x1" in line)
    assert "#" * 14 + "." * 10 in learner
    assert "\n".join(lines).isascii()


def test_plain_output_names_the_bounding_pool_once_in_a_while() -> None:
    view, output = build_plain_view()
    with view:
        view.show_pools(build_pools(), "")  # nothing to say yet, so the minute has not begun
        for _ in range(5):
            view.show_pools(build_pools(), LINE)
    assert output.getvalue() == f"[pools] {LINE}\n"
    console = Console(file=io.StringIO(), width=20)
    with LiveView("run", console=console, pools_interval_seconds=0.0) as view:
        for _ in range(3):
            view.show_pools(build_pools(), LINE)
    assert console.file.getvalue().count(LINE) == 3  # type: ignore[attr-defined]
