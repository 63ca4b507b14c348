"""The page's style sheet."""

STYLE = """
:root {
  --paper: #ffffff; --panel: #f5f7f9; --ink: #1f2328; --muted: #59636e; --line: #d5dbe1;
  --one: #2a6f97; --two: #c2660c; --warn: #9a6700; --warn-paper: #fff8e1; --fine: #1a7f37;
}
@media (prefers-color-scheme: dark) {
  :root {
    --paper: #0f1318; --panel: #181e25; --ink: #e6edf3; --muted: #9aa4af; --line: #333c46;
    --one: #5ea9d6; --two: #ea9a4f; --warn: #e3b341; --warn-paper: #2a2312; --fine: #56d364;
  }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 66rem; padding: 2rem 1.25rem 4rem; background: var(--paper); color: var(--ink);
  font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
h1 { font-size: 1.7rem; margin: 0 0 .5rem; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 .75rem; padding-bottom: .3rem; border-bottom: 1px solid var(--line); }
h3 { font-size: 1rem; margin: 0 0 .4rem; }
code, pre, .token { font-family: ui-monospace, "SF Mono", Menlo, Consolas, monospace; }
.verdict { font-size: 1.1rem; max-width: 50rem; }
.muted { color: var(--muted); }
.fine { color: var(--fine); font-weight: 600; }
.warning { border-left: 4px solid var(--warn); background: var(--warn-paper); padding: .75rem 1rem; border-radius: 4px; max-width: 50rem; }
.warning ul { margin: .3rem 0 0; padding-left: 1.2rem; }
.charts { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 26rem), 1fr)); gap: 1.5rem; align-items: start; }
figure { margin: 0 0 1rem; overflow-x: auto; }
svg { display: block; width: 100%; max-width: 45rem; font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; }
figure.wide svg { min-width: 36rem; }
svg text { fill: var(--ink); }
svg text.muted { fill: var(--muted); }
svg text.title { font-size: 14px; font-weight: 600; }
svg .one { fill: var(--one); }
svg .two { fill: var(--two); }
svg .grid { stroke: var(--line); }
svg .axis { stroke: var(--muted); }
svg rect:hover { opacity: .75; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; margin-bottom: 1rem; }
th, td { text-align: left; padding: .25rem 1.25rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
td { font-variant-numeric: tabular-nums; overflow-wrap: anywhere; }
thead th { color: var(--muted); font-weight: 500; }
tbody th { font-weight: 500; white-space: nowrap; padding-right: 2rem; }
article { background: var(--panel); border: 1px solid var(--line); border-radius: 8px; padding: .9rem 1.1rem; margin-bottom: 1rem; }
article p { margin: 0 0 .5rem; font-size: .9rem; }
pre { margin: 0 0 .5rem; white-space: pre-wrap; overflow-wrap: anywhere; unicode-bidi: isolate; max-height: 22rem; overflow-y: auto;
  font-size: .85rem; line-height: 1.45; }
.given { color: var(--muted); }
.user { color: var(--two); }
.special { border: 1px solid var(--line); border-radius: 4px; padding: 0 .2em; color: var(--one); }
summary { cursor: pointer; color: var(--muted); font-size: .9rem; }
"""
