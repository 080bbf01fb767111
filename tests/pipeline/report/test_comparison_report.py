"""Test the report of two runs: its content, and its page in a real browser."""

import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest
from matplotlib.image import imread

from pipeline.report.__main__ import write_report
from tests.pipeline.report.planted_runs import write_run
from tests.runs import python

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)

# Added to a copy of the page: once loaded, the page reports these facts in its own title.
FACTS_SCRIPT = """<script>addEventListener("load", () => {
  const images = [...document.images];
  document.title = JSON.stringify({
    drawn: images.filter(image => image.complete && image.naturalWidth > 300).length,
    images: images.length,
    withAltText: images.filter(image => image.alt.length > 20).length,
    requests: performance.getEntriesByType("resource").filter(entry => !entry.name.startsWith("data:")).length,
    overflow: document.documentElement.scrollWidth - innerWidth,
    sections: [...document.querySelectorAll("h2")].map(heading => heading.innerText),
    anchors: [...document.querySelectorAll("nav a")].every(a => document.getElementById(a.hash.slice(1))),
    closed: [...document.querySelectorAll("details")].every(details => !details.open),
  });
})</script>"""


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("runs")
    sft = write_run(root / "sft", 0.0, {"en": 15, "de": 10, "sw": 4}, apart=4.0)
    solar = write_run(root / "solar", 1.0, {"en": 15, "de": 9, "sw": 12}, apart=0.5)
    result = python("-m", "pipeline.report", "--run", sft, solar, "--output", root / "report")
    assert result.returncode == 0, result.stderr
    return root / "report"


def test_report_of_two_runs_has_all_sections(report: Path) -> None:
    text = (report / "report.md").read_text()
    for expected in [
        "# sft and solar",
        "Comparison of 2 runs on 20 problems in 3 languages; sft is the baseline. "
        "solar: Primary measure, the mean of all languages: +11.7 points, ",
        "| language | n | sft | solar | solar − sft | Holm p | unfinished %: sft, solar | in the language %: sft, ",
        "| **mean of languages** | **60** | **48.3** | **60.0** | **+11.7 (",
        "| unfinished responses, % | 5.0 | 5.0 |",
        "sft: 3 of 60 responses are unfinished, cut at 64 tokens: sw 3.",
        "| accuracy, mean of languages, % | 48.3 | 60.0 |",
        "| step of the evaluated model | – | 40 |",
        "| steps trained | 59 | 59 |",
        "solar: model `solar/hf` (step 40), data `test.jsonl`, greedy decoding of at most 64 tokens in bfloat16.",
        "| sw | 20 | 20.0 (8.1 to 41.6) | 60.0 (38.7 to 78.1) | +40.0 (",
        " | 0.0234 | 15.0, 15.0 | 0.0, 0.0 |",
        "| 8 | 0 | 0.00781 | 0.0234 | higher beyond the noise of problems |",
        "| 0 | 1 | 1 | 1 | no difference beyond noise |",
        "| words in another script, % | 0.0 | 0.0 |",
        "| soft tokens of translations | solar − sft |",
        "| loss.alignment_weight | 0.0 | 1.0 |",
        "Two languages give the same answer",
        "| sw | lingua | 0.0 | 0.0 to 16.1 | 0.0 | 100.0 | de 20 | – | – | 0.0 |",
        "| sw | 15.0 | 9 | 0.35 | 185 |",
        "| sw | rules of sw | number 20 | 0 | 20 | 0 | 0 | 0 |",
        "| sft: after the final norm |",
        "| ce_loss | 3 → 0.050847 | 3 → 0.050847 |",
        "torch 9.9.9",
    ]:
        assert expected in text, expected
    assert ": higher beyond the noise of problems. One seed: " in text.splitlines()[2]
    (first, second) = re.findall(r"\| centered cosine of pairs, soft tokens \| (\S+) \| (\S+) \|", text)[0]
    (difference,) = re.findall(r"\| centered cosine \| (\S+) \(", text)
    assert float(difference) == pytest.approx(float(second) - float(first), abs=0.0011)
    assert "| seed |" not in text and "output_dir |" not in text  # only differing settings, not paths
    (silhouettes,) = re.findall(r"\| silhouette by language, final state \| (\S+) \| (\S+) \|", text)
    assert float(silhouettes[0]) > 0.4 > float(silhouettes[1])


def test_report_says_what_differences_leave_out(report: Path, tmp_path: Path) -> None:
    """A run that was evaluated in fewer languages: the differences are not those of the mean accuracies."""
    sft, solar = report.parent / "sft", shutil.copytree(report.parent / "solar", tmp_path / "solar")
    rows = (solar / "generations.jsonl").read_text().splitlines(keepends=True)
    (solar / "generations.jsonl").write_text("".join(row for row in rows if '"sw"' not in row))
    evaluation = json.loads((solar / "evaluation.json").read_text())
    del evaluation["languages"]["sw"], evaluation["output_languages"]["sw"]
    evaluation["macro"]["accuracy"] = 0.6
    (solar / "evaluation.json").write_text(json.dumps(evaluation))
    write_report([sft, solar], tmp_path / "report")
    text = (tmp_path / "report" / "report.md").read_text()
    assert "| **mean of languages** | **60, 40** | **48.3** | **60.0** | **-2.5 (" in text
    summary, note = text.splitlines()[2], "Differences in percentage points, on the records that both runs have, with"
    assert (
        "20 records that one of the two lacks were left out: the differences are those of the other 40, in 2" in summary
    )
    assert note in text and "were left out" not in (report / "report.md").read_text()


def test_report_html_is_self_contained(report: Path) -> None:
    page = (report / "report.html").read_text()
    assert page.count("data:image/svg+xml;base64,") == 6
    assert not re.findall(r"""(?:src|href)=["'](?!data:|#)""", page)
    assert "http" not in re.sub(r"base64,[A-Za-z0-9+/=]*", "", page)


@pytest.mark.skipif(BROWSER is None, reason="no Chromium on this machine (Debian: apt-get install chromium)")
@pytest.mark.parametrize("width", [1280, 600])
def test_report_html_renders_in_browser(report: Path, tmp_path: Path, width: int) -> None:
    (tmp_path / "page.html").write_text(
        (report / "report.html").read_text().replace("</body>", FACTS_SCRIPT + "</body>")
    )
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path}/profile", "--dump-dom"]
    flags += [f"--window-size={width},1800", f"--screenshot={tmp_path}/shot.png", "--virtual-time-budget=20000"]
    result = subprocess.run(
        [str(BROWSER), *flags, f"file://{tmp_path}/page.html"], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0, result.stderr
    (title,) = re.findall(r"<title>(.*?)</title>", result.stdout)
    facts = json.loads(title.replace("&quot;", '"').replace("&amp;", "&"))
    assert facts["images"] == facts["drawn"] == facts["withAltText"] == 6
    assert facts["requests"] == 0 and facts["overflow"] <= 0 and facts["anchors"] and facts["closed"]
    assert facts["sections"] == [
        "Accuracy per language",
        "Overview",
        "Differences from sft",
        "Agreement across languages, languages of the outputs",
        "Representations",
        "Training",
        "Settings",
        "Versions",
    ]
    shot = imread(tmp_path / "shot.png")[..., :3]
    assert shot.shape[1] == width
    colors = {tuple(pixel) for pixel in (shot[::7, ::7] * 255).astype(int).reshape(-1, 3)}
    assert (0x2F, 0x6D, 0xB3) in colors and (0xD9, 0x82, 0x2B) in colors  # the colors of both runs
