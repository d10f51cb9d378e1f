"""The look of report.html: one style sheet, light and dark."""

from __future__ import annotations

__all__ = ["AFTER", "BEFORE", "STYLE"]

BEFORE, AFTER = "#9aa4b2", "#3b82f6"

STYLE = (
    (
        """
:root { color-scheme: light dark; --ink: #1f2933; --soft: #64748b; --line: #e2e8f0; --page: #ffffff; --card: #f8fafc;
  --good: #15803d; --bad: #c2410c; --before: BEFORE; --after: AFTER; }
@media (prefers-color-scheme: dark) { :root { --ink: #e5e9f0; --soft: #94a3b8; --line: #334155; --page: #0f172a;
  --card: #1e293b; --good: #4ade80; --bad: #fb923c; } }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1080px; padding: 40px 28px 64px; background: var(--page); color: var(--ink);
  font: 15px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "DejaVu Sans", sans-serif; }
h1 { font-size: 27px; line-height: 1.25; margin: 0 0 4px; letter-spacing: -0.01em; }
h2 { font-size: 19px; margin: 52px 0 4px; letter-spacing: -0.01em; }
h2 + .lead { margin: 0 0 16px; } .lead { color: var(--soft); max-width: 46em; }
h2 + div, h2 + figure, h2 + table { margin-top: 14px; }
h3 { font-size: 15px; margin: 0 0 8px; font-weight: 600; }
.soft { color: var(--soft); } .good { color: var(--good); } .bad { color: var(--bad); }
nav { margin: 16px 0 0; font-size: 13px; } nav a { color: var(--soft); margin-right: 16px; text-decoration: none; }
nav a:hover { color: var(--after); }
.hero { display: flex; flex-wrap: wrap; align-items: center; gap: 8px 30px; margin: 24px 0 0; padding: 22px 26px;
  background: var(--card); border: 1px solid var(--line); border-radius: 14px; }
.hero .big { font-size: 46px; font-weight: 650; line-height: 1.1; letter-spacing: -0.02em; }
.hero .from { font-size: 28px; color: var(--soft); } .hero .arrow { font-size: 26px; color: var(--soft); }
.hero small { display: block; font-size: 13px; font-weight: 400; color: var(--soft); letter-spacing: 0; }
.hero .words { flex: 1 1 300px; color: var(--soft); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: 12px; margin: 12px 0 0; }
.tile { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 11px 15px; }
.tile b { display: block; font-size: 21px; line-height: 1.35; font-weight: 620; }
.tile span { color: var(--soft); font-size: 12.5px; line-height: 1.35; display: block; }
figure { margin: 0; } svg { max-width: 100%; height: auto; } svg text { font-family: inherit !important; }
table { border-collapse: collapse; width: 100%; font-size: 14px; }
th { text-align: left; font-weight: 600; color: var(--soft); }
th, td { padding: 4px 12px 4px 0; border-bottom: 1px solid var(--line); vertical-align: middle; }
td.n, th.n { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.scroll { max-height: 560px; overflow: auto; border-bottom: 1px solid var(--line); }
.scroll th { position: sticky; top: 0; background: var(--page); }
td:has(> .bars) { width: 36%; }
.bars { min-width: 150px; } .bars div { height: 7px; border-radius: 3px; margin: 2px 0; min-width: 1px; }
.before { background: var(--before); } .after { background: var(--after); }
.key { display: inline-block; width: 11px; height: 11px; border-radius: 3px; margin: 0 5px 0 14px; }
.two { display: grid; grid-template-columns: repeat(auto-fit, minmax(400px, 1fr)); gap: 20px 44px; align-items: start; }
.strip { display: flex; flex-wrap: wrap; gap: 12px; } .strip figure { width: 104px; }
.gallery { display: grid; grid-template-columns: repeat(auto-fill, minmax(132px, 1fr)); gap: 18px 16px; }
.gallery img, .strip img { width: 100%; border-radius: 8px; display: block; background: var(--line); }
figcaption { font-size: 12.5px; line-height: 1.35; margin-top: 5px; overflow-wrap: anywhere; }
td { overflow-wrap: anywhere; }
.case { display: grid; grid-template-columns: 210px 1fr; gap: 6px 24px; padding: 14px 0; border-bottom: 1px solid var(--line); }
.case p { margin: 0; font-size: 13px; } .case b { overflow-wrap: anywhere; }
.notes { background: var(--card); border-left: 3px solid var(--before); border-radius: 4px; padding: 10px 16px;
  margin: 18px 0 0; font-size: 14px; } .notes ul { margin: 2px 0; padding-left: 18px; }
footer { margin-top: 56px; color: var(--soft); font-size: 13px; }
@media (max-width: 640px) { .case { grid-template-columns: 1fr; } .two { grid-template-columns: 1fr; } }
@media print { nav { display: none; } .scroll { max-height: none; } }
"""
    )
    .replace("BEFORE", BEFORE)
    .replace("AFTER", AFTER)
)
