"""How the report looks: the colours it shares with its plots, its style and its frame."""

from __future__ import annotations

LIGHT = {
    "paper": "#ffffff",
    "panel": "#f6f7f9",
    "ink": "#1f2328",
    "muted": "#636c76",
    "grid": "#e3e6ea",
    "student": "#0a66c2",
    "ema": "#d9580d",
    "baseline": "#7d8590",
    "teacher": "#8250df",
    "third": "#1a7f4b",
    "fourth": "#b7318e",
    "bad": "#cf222e",
}
DARK = {
    "paper": "#14171c",
    "panel": "#1c2027",
    "ink": "#e6e9ed",
    "muted": "#9aa3ad",
    "grid": "#2f353e",
    "student": "#6cb2ff",
    "ema": "#ff9d5c",
    "baseline": "#8d96a1",
    "teacher": "#c4a2ff",
    "third": "#5bd694",
    "fourth": "#f58bd0",
    "bad": "#ff7b72",
}


def with_variables(svg: str) -> str:
    """The same drawing with each colour of ``LIGHT`` as the CSS variable that the page themes."""
    for name, colour in LIGHT.items():
        svg = svg.replace(colour, f"var(--{name})")
    return svg


def style_sheet() -> str:
    """The whole style, with both sets of colours."""
    light, dark = (
        " ".join(f"--{name}: {colour};" for name, colour in colours.items())
        for colours in (LIGHT, DARK)
    )
    dark_rule = f"@media (prefers-color-scheme: dark) {{ :root {{ {dark} }} }}"
    return f":root {{ color-scheme: light dark; {light} }}\n{dark_rule}\n{_RULES}"


_RULES = """\
* { box-sizing: border-box; }
:root { --sans: system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", sans-serif; }
body {
  margin: 0 auto; padding: 3rem 1.5rem 4rem; max-width: 66rem;
  background: var(--paper); color: var(--ink); font: 16px/1.55 var(--sans);
  -webkit-text-size-adjust: 100%;
}
header p { margin: .3rem 0 0; color: var(--muted); font-variant-numeric: tabular-nums; }
h1 { margin: 0; font-size: 1.9rem; line-height: 1.2; letter-spacing: -.02em; }
h2 { margin: 3rem 0 .9rem; font-size: 1.15rem; letter-spacing: -.005em; }
main .verdict {
  margin: 0 0 1.4rem; padding: .9rem 1.2rem; max-width: none;
  background: var(--panel); border-left: 3px solid var(--student); border-radius: 0 6px 6px 0;
}
main p, li { max-width: 46rem; }
.note { color: var(--muted); font-size: .84rem; line-height: 1.5; }
.scroll { overflow-x: auto; }
table {
  width: 100%; border-collapse: collapse; font-size: .92rem;
  font-variant-numeric: tabular-nums lining-nums;
}
th, td { padding: .5rem .35rem .5rem 1rem; text-align: right; white-space: nowrap; }
th:first-child { padding-left: 0; text-align: left; }
thead th { color: var(--muted); font-weight: 500; border-bottom: 1px solid var(--muted); }
tbody th { font-weight: 400; }
tbody tr + tr > * { border-top: 1px solid var(--grid); }
tbody tr:last-child > * { border-bottom: 1px solid var(--grid); }
tr.chosen > * { font-weight: 650; }
.grid {
  display: grid; gap: 2rem 2.2rem;
  grid-template-columns: repeat(auto-fit, minmax(min(26rem, 100%), 1fr));
}
figure { margin: 0; min-width: 0; }
.plot { display: block; width: 100%; max-width: 40rem; height: auto; overflow: visible; }
.plot * { stroke-linejoin: round; stroke-linecap: butt; }
.plot text {
  font-family: var(--sans) !important; font-variant-numeric: tabular-nums;
}
pre, code { font-family: ui-monospace, "SF Mono", Menlo, Consolas, "DejaVu Sans Mono", monospace; }
code { font-size: .88em; }
pre {
  margin: .6rem 0; padding: .9rem 1.1rem; overflow-x: auto; font-size: .82rem; line-height: 1.5;
  background: var(--panel); border-radius: 6px;
}
.sample { margin: 0 0 1.1rem; }
.sample pre { white-space: pre-wrap; overflow-wrap: anywhere; }
.sample b { color: var(--student); font-weight: 600; }
figcaption, time { color: var(--muted); font-size: .84rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .3rem 1.6rem; margin: 0; }
dt { color: var(--muted); }
dd { margin: 0; white-space: pre-wrap; overflow-wrap: anywhere; }
ul { padding-left: 1.2rem; }
details { margin-top: 1.6rem; }
details + details { margin-top: .6rem; }
section + details { margin-top: 3rem; }
summary { cursor: pointer; font-size: 1.15rem; font-weight: 700; }
details > :not(summary) { margin-top: .8rem; }
footer { margin-top: 3.5rem; padding-top: 1rem; border-top: 1px solid var(--grid); }
@media (max-width: 40rem) { dl { grid-template-columns: 1fr; } dd { margin-bottom: .5rem; } }
@media print { body { padding: 0; } figure, tr { break-inside: avoid; } }
"""

DOCUMENT = """\
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy"
  content="default-src 'none'; style-src 'unsafe-inline'">
<title>{name}: distillation report</title>
<style>
{style}</style>
</head>
<body>
<header>
<h1>{name}</h1>
<p>{facts}</p>
</header>
<main>
{body}
</main>
</body>
</html>
"""
