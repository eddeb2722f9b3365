"""`spvla report RUN`: one self-contained HTML file that opens from disk, with no network and no scripts."""

from pathlib import Path

from jinja2 import Environment, FileSystemLoader, StrictUndefined

from spvla.config import ReportConfig
from spvla.files import expanded, write_text
from spvla.report.story import Story, interval, percent, task_label, tell
from spvla.runs import REPORT


def report(config: ReportConfig) -> Path:
    """Writes the report and returns its path. Raises UserError when `config.run` is no run folder."""
    run = expanded(config.run, flag="RUN")
    out = expanded(config.out, flag="--out") if config.out else run / REPORT
    write_text(out, render(tell(run)))
    print(f"report  {out.resolve()}")
    return out


def render(story: Story) -> str:
    """The page as text. Everything a run can contain is escaped; only the plots drawn here are inserted as they are."""
    pages = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True, undefined=StrictUndefined)
    pages.filters |= {"percent": percent, "interval": interval, "task_label": task_label}
    return pages.get_template("template.html").render(story=story)
