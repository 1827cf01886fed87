"use strict";
// Draws the reports of this page. body.dataset tells how that went, for whoever checks it: `charts` and `errors`.
(() => {
  const { title, runs, groups, figures } = JSON.parse(document.getElementById("data").textContent);
  const COLOURS = ["#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#e7298a", "#8c6d31", "#17a2b8", "#7f7f7f"];
  const MIB = 1048576;
  const errors = [];
  addEventListener("error", (event) => { errors.push(event.message); document.body.dataset.errors = errors.length; });
  document.body.dataset.errors = 0;

  const element = (tag, attributes = {}, ...children) => {
    const made = document.createElement(tag);
    for (const [name, value] of Object.entries(attributes)) made.setAttribute(name, value);
    made.append(...children.filter((child) => child !== null && child !== undefined));
    return made;
  };

  // ---- light and dark: as the reader's system has it, or #dark and #light, or the button ----
  const root = document.documentElement;
  const system = matchMedia("(prefers-color-scheme: dark)");
  let chosen = { "#dark": true, "#light": false }[location.hash];
  const isDark = () => chosen ?? system.matches;
  const paint = () => { root.classList.toggle("dark", isDark()); root.style.colorScheme = isDark() ? "dark" : "light"; };
  paint();
  system.addEventListener("change", () => { paint(); drawAll(); });
  document.getElementById("theme").addEventListener("click", () => { chosen = !isDark(); paint(); drawAll(); });
  const ink = (name) => getComputedStyle(root).getPropertyValue(name).trim();

  // ---- names: what all runs have in common need not be said each time ----
  const parts = runs.map((run) => run.name.split(" · "));
  const differs = parts[0]?.map((_, index) => parts.some((other) => other[index] !== parts[0][index])) ?? [];
  const seen = new Map();
  for (const [index, run] of runs.entries()) {
    const short = runs.length > 1 ? parts[index].filter((_, part) => differs[part] !== false).join(" · ") : run.settings.scenario;
    const name = short || run.settings.scenario;
    const times = (seen.get(name) ?? 0) + 1;
    seen.set(name, times);
    run.label = times > 1 ? `${name} #${times}` : name;
    run.colour = COLOURS[index % COLOURS.length];
    // One of each kind, to begin with.
    run.drawn = runs.findIndex((other) => other.name === run.name) === index && new Set(runs.slice(0, index + 1).map((it) => it.name)).size <= 4;
  }
  const common = parts[0]?.filter((_, index) => !differs[index]).join(" · ");
  document.getElementById("lead").textContent =
    [`${runs.length} ${runs.length === 1 ? "run" : "runs"}`, runs.length > 1 && common ? `all: ${common}` : null].filter(Boolean).join("; ");

  // ---- tables that can be sorted ----
  const number = (value, digits) => value === null || value === undefined ? "–"
    : value.toLocaleString("en", { maximumFractionDigits: digits ?? (Math.abs(value) < 10 ? 2 : Math.abs(value) < 100 ? 1 : 0) });
  const sortable = (table, columns, rows) => {
    let by = -1, down = false;
    const fill = () => {
      const order = [...rows];
      if (by >= 0) {
        order.sort((a, b) => {
          const [x, y] = [columns[by].value(a), columns[by].value(b)];
          if (x === null || x === undefined) return 1; // What is not known comes last, up or down.
          if (y === null || y === undefined) return -1;
          const order = typeof x === "string" ? x.localeCompare(y, "en", { numeric: true }) : x - y;
          return down ? -order : order;
        });
      }
      const head = element("tr", {}, ...columns.map((column, index) => {
        const button = element("button", { type: "button" }, column.name);
        button.addEventListener("click", () => { down = by === index && !down; by = index; fill(); });
        const sort = by === index ? (down ? "descending" : "ascending") : "none";
        return element("th", { scope: "col", "aria-sort": sort }, button);
      }));
      const cells = (row) => columns.map((column) => column.cell ? column.cell(row) : element("td", {}, number(column.value(row), column.digits)));
      table.replaceChildren(element("thead", {}, head), element("tbody", {}, ...order.map((row) => element("tr", {}, ...cells(row)))));
    };
    fill();
  };
  const s = (run) => run.summary;
  const kept = (run) => s(run).speed_before > 0 && s(run).speed_during !== null ? s(run).speed_during / s(run).speed_before * 100 : null;
  const cpu = (run) => {
    const known = ["source_qemu_cpu_s", "destination_qemu_cpu_s", "source_agent_cpu_s", "destination_agent_cpu_s"].map((it) => s(run)[it]).filter((it) => it !== null);
    return known.length ? known.reduce((a, b) => a + b) : null;
  };
  const verdict = { intact: ["intact", "good"], damaged: ["DAMAGED", "bad"], "not-checked": ["not checked", ""] };
  const runColumns = [
    { name: "run", value: (run) => run.label, cell: (run) => {
      const box = element("input", { type: "checkbox", "aria-label": `draw ${run.label}` });
      box.checked = run.drawn;
      box.addEventListener("change", () => { run.drawn = box.checked; drawAll(); });
      return element("td", {}, box, element("span", { class: "swatch", style: `background:${run.colour}` }), run.label);
    } },
    { name: "outcome", value: (run) => run.outcome.end, cell: (run) => run.outcome.end === "completed"
      ? element("td", {}, "completed")
      : element("td", { class: "bad", title: run.outcome.reason }, "did not complete") },
    { name: "total, s", value: (run) => s(run).total_ms === null ? null : s(run).total_ms / 1e3, digits: 2 },
    { name: "downtime, ms", value: (run) => s(run).downtime_ms ?? (run.origin === "bench" ? null : s(run).downtime_told_ms), digits: 0 },
    { name: "worst stall, ms", value: (run) => s(run).worst_stall_ms, digits: 0 },
    { name: "worst 64 MiB, ms", value: (run) => s(run).worst_64_mib_ms, digits: 0 },
    { name: "speed kept, %", value: kept, digits: 0 },
    { name: "rounds", value: (run) => s(run).rounds, digits: 0 },
    { name: "sent, MiB", value: (run) => s(run).sent === null ? null : s(run).sent / MIB, digits: 0 },
    { name: "throttle, %", value: (run) => s(run).throttle, digits: 0 },
    { name: "CPU beside the guest, s", value: cpu, digits: 1 },
    { name: "memory", value: (run) => run.page_check.verdict, cell: (run) => {
      const [words, kind] = verdict[run.page_check.verdict] ?? [run.page_check.verdict, ""];
      return element("td", { class: `text ${kind}`, title: run.page_check.detail ?? run.page_check.reason ?? "" }, words);
    } },
    { name: "busy host", value: (run) => Number(s(run).host_was_busy), cell: (run) => element("td", { class: "text" }, s(run).host_was_busy ? "yes" : "") },
  ];
  sortable(document.getElementById("run-table"), runColumns, runs);
  if (groups.length) {
    document.getElementById("medians").hidden = false;
    const known = figures.filter(([name]) => groups.some((group) => group.figures[name]));
    const spread = (name) => (group) => {
      const figure = group.figures[name];
      return figure ? element("td", {}, number(figure[0]), element("span", { class: "range" }, ` (${number(figure[1])} to ${number(figure[2])})`)) : element("td", {}, "–");
    };
    sortable(document.getElementById("median-table"), [
      { name: "set-up", value: (group) => group.name, cell: (group) => element("td", {}, group.name) },
      { name: "completed", value: (group) => group.completed / group.runs, cell: (group) =>
        element("td", { class: group.completed < group.runs ? "bad" : "" }, `${group.completed} of ${group.runs}`) },
      ...known.map(([name, unit]) => ({ name: `${name}, ${unit}`, value: (group) => group.figures[name]?.[0] ?? null, cell: spread(name) })),
    ], groups);
  }

  // ---- charts ----
  // A line is [name, colour, dash, [[x in s, y], …]]; lines of one chart share their x.
  const seconds = (ms) => ms / 1e3;
  const line = (run, what, dash, points) => ({ name: what ? `${run.label}: ${what}` : run.label, colour: run.colour, dash, points });
  const progress = (value) => (run) => run.samples.progress.map((it) => [seconds(it.at_ms), value(it)]);
  const speed = (run) => {
    // All threads together: what was done in each fifth of a second, by when it was done.
    const bins = new Map();
    const WIDTH = 0.2;
    for (const record of run.samples.records) {
      const end = seconds(record.at_ms), begin = end - record.ms / 1e3, rate = record.bytes / MIB / Math.max(record.ms / 1e3, 1e-6);
      for (let bin = Math.floor(begin / WIDTH); bin <= Math.floor(end / WIDTH); bin++) {
        const share = Math.min(end, (bin + 1) * WIDTH) - Math.max(begin, bin * WIDTH);
        bins.set(bin, (bins.get(bin) ?? 0) + rate * Math.max(share, 0) / WIDTH);
      }
    }
    const [first, last] = [Math.min(...bins.keys()), Math.max(...bins.keys())];
    const points = [];
    // The first and the last bin are not full.
    for (let bin = first + 1; bin < last; bin++) points.push([(bin + 0.5) * WIDTH, bins.get(bin) ?? 0]);
    return points;
  };
  const CPU_KINDS = [
    ["host", (it) => it.host, []],
    ["source QEMU: vCPUs", (it) => it.source_qemu?.vcpu, []],
    ["source QEMU: migration", (it) => it.source_qemu?.migration, [6, 3]],
    ["source QEMU: other", (it) => it.source_qemu?.other, [2, 3]],
    ["destination QEMU: vCPUs", (it) => it.destination_qemu?.vcpu, []],
    ["destination QEMU: migration", (it) => it.destination_qemu?.migration, [6, 3]],
    ["destination QEMU: other", (it) => it.destination_qemu?.other, [2, 3]],
    ["source agent", (it) => it.source_agent, [6, 3]],
    ["destination agent", (it) => it.destination_agent, [2, 3]],
    ["other programs", (it) => it.others, [1, 4]],
    ["destination's host", (it) => it.destination_host, []],
    ["other programs there", (it) => it.destination_others, [1, 4]],
  ];
  const cpuLines = (run) => CPU_KINDS
    .map(([name, value, dash], index) => ({ name, colour: COLOURS[index % COLOURS.length], dash, points: run.samples.cpu.map((it) => [seconds(it.at_ms), value(it) ?? null]) }))
    .filter((it) => it.points.some(([, y]) => y !== null && y > 0.5));
  const CHARTS = [
    { title: "How fast the guest rewrites its memory", unit: "MiB/s", about: "By the records of 64 MiB that its threads report, on the host's clock.",
      lines: (drawn) => drawn.filter((run) => run.samples.records.length > 2).map((run) => line(run, "", [], speed(run))) },
    { title: "When the guest's heart stood still", unit: "ms", log: true, points: true, about: "Each wait for a beat of 20 ms and more beyond the usual; the switchover is among them.",
      lines: (drawn) => drawn.map((run) => line(run, "", [], run.samples.stalls.map((it) => [seconds(it.at_ms), Math.max(it.ms, 1)]))) },
    { title: "What is left to be sent", unit: "MiB", about: "Of the round, or in post-copy of everything.",
      lines: (drawn) => drawn.map((run) => line(run, "", [], progress((it) => it.remaining / MIB)(run))) },
    { title: "How fast the guest makes pages stale, and what the link carries", unit: "MiB/s", about: "Where the first (dashed) is above the second, rounds lead nowhere.",
      lines: (drawn) => drawn.flatMap((run) => [line(run, "link", [], progress((it) => it.link_rate / MIB)(run)), line(run, "dirty", [6, 4], progress((it) => it.dirty_rate / MIB)(run))]) },
    { title: "How much the guest is slowed down on purpose", unit: "%", about: "",
      lines: (drawn) => drawn.filter((run) => run.summary.throttle > 0).map((run) => line(run, "", [], progress((it) => it.throttle)(run))) },
  ];
  const WORDS = { copy: "copy", paused: "paused", "post-copy": "post-copy", left: "left", arrived: "arrived", cancelled: "stopped", end: "end" };

  // Rounds and what happened, behind the lines.
  const marks = (drawn, alone) => (chart) => {
    const { ctx, bbox } = chart;
    const vertical = (x, colour, dash, text, row) => {
      const at = chart.valToPos(x, "x", true);
      if (at < bbox.left || at > bbox.left + bbox.width) return;
      ctx.save();
      ctx.strokeStyle = ctx.fillStyle = colour;
      ctx.setLineDash(dash);
      ctx.lineWidth = devicePixelRatio;
      ctx.beginPath(); ctx.moveTo(at, bbox.top); ctx.lineTo(at, bbox.top + bbox.height); ctx.stroke();
      if (text) {
        ctx.font = `${11 * devicePixelRatio}px system-ui, sans-serif`;
        const right = at + ctx.measureText(text).width + 6 * devicePixelRatio > bbox.left + bbox.width;
        ctx.textAlign = right ? "right" : "left";
        ctx.fillText(text, at + (right ? -3 : 3) * devicePixelRatio, bbox.top + (11 + 13 * row) * devicePixelRatio);
      }
      ctx.restore();
    };
    for (const run of drawn) {
      const colour = alone ? ink("--faint") : run.colour;
      if (alone) for (const round of run.rounds) vertical(seconds(round.at_ms), ink("--line"), [], "", 0);
      for (const [index, mark] of run.marks.entries()) {
        if (alone || ["left", "arrived"].includes(mark.what)) vertical(seconds(mark.at_ms), colour, [4, 3], alone ? WORDS[mark.what] ?? mark.what : "", index % 3);
      }
    }
  };

  const living = [];
  const draw = (box, spec, lines, drawn, time) => {
    const xs = [...new Set(lines.flatMap((it) => it.points.map(([x]) => x)))].sort((a, b) => a - b);
    if (!xs.length) return false;
    const data = [xs, ...lines.map((it) => { const at = new Map(it.points); return xs.map((x) => at.has(x) ? at.get(x) : undefined); })];
    const axis = { stroke: ink("--faint"), grid: { stroke: ink("--line"), width: 1 }, ticks: { stroke: ink("--line") } };
    const chart = new uPlot({
      width: box.clientWidth,
      height: Math.max(200, Math.min(320, box.clientWidth * 0.4)),
      cursor: { sync: { key: "time" } },
      scales: { x: { time: false, range: (_, from, to) => from === xs[0] && to === xs.at(-1) ? time : [from, to] }, y: spec.log ? { distr: 3, log: 10 } : { range: (_, __, most) => [0, Math.max(most, 1) * 1.05] } },
      axes: [{ ...axis, values: (_, ticks) => ticks.map((tick) => `${tick} s`) }, { ...axis, size: 64, label: spec.unit, labelSize: 18,
        // On a scale by powers of ten only these are written.
        values: (_, ticks) => ticks.map((tick) => spec.log && !Number.isInteger(Math.log10(tick)) ? "" : number(tick)) }],
      series: [{ label: "s", value: (_, x) => x === null || x === undefined ? "–" : x.toFixed(2) }, ...lines.map((it) => ({
        label: it.name, stroke: it.colour, width: spec.points ? 0 : 1.5, dash: it.dash, spanGaps: true,
        paths: spec.points ? () => null : undefined,
        points: spec.points ? { show: true, size: 6, fill: it.colour } : { show: false },
        value: (_, y) => number(y),
      }))],
      hooks: { drawClear: [marks(drawn, drawn.length === 1)] },
    }, data, box);
    living.push([chart, box]);
    return true;
  };

  function drawAll() {
    for (const [chart] of living.splice(0)) chart.destroy();
    const place = document.getElementById("charts");
    place.replaceChildren();
    const drawn = runs.filter((run) => run.drawn);
    const charts = CHARTS.map((spec) => [spec, spec.lines(drawn).filter((it) => it.points.length), drawn]);
    for (const run of drawn.slice(0, 4)) {
      charts.push([{ title: drawn.length > 1 ? `Processors: ${run.label}` : "Processors", unit: "% of one", about: "QEMU's threads by their kind." }, cpuLines(run), [run]]);
    }
    // Charts that lie below one another show the same stretch of time; one can still be looked at more closely.
    const all = charts.flatMap(([, lines]) => lines.flatMap((it) => it.points.map(([x]) => x)));
    const time = all.reduce(([least, most], x) => [Math.min(least, x), Math.max(most, x)], [Infinity, -Infinity]);
    let count = 0;
    for (const [spec, lines, of] of charts) {
      if (!lines.length) continue;
      const box = element("div", { class: "chart" });
      place.append(element("h2", {}, spec.title), spec.about ? element("p", {}, spec.about) : null ?? "", box);
      if (draw(box, spec, lines, of, time)) count++;
    }
    if (!drawn.length) place.append(element("p", {}, "No run is chosen."));
    document.body.dataset.charts = count;
  }
  drawAll();
  let waiting;
  addEventListener("resize", () => { clearTimeout(waiting); waiting = setTimeout(() => { for (const [chart, box] of living) chart.setSize({ width: box.clientWidth, height: chart.height }); }, 100); });
  // Paper has another width than the screen.
  addEventListener("beforeprint", () => { chosen = false; paint(); drawAll(); });

  // ---- details ----
  const plain = (value) => Array.isArray(value) ? value.join(", ") : typeof value === "object" ? JSON.stringify(value) : String(value);
  const list = (entries) => element("dl", {}, ...entries.filter(([, value]) => value !== null && value !== undefined && value !== "" && plain(value) !== "{}")
    .flatMap(([name, value]) => [element("dt", {}, name.replaceAll("_", " ")), element("dd", {}, plain(value))]));
  document.getElementById("details").append(...runs.map((run) => element("details", {},
    element("summary", {}, run.label),
    list([["outcome", run.outcome.reason ?? "completed"], ["memory", run.page_check.detail ?? run.page_check.reason ?? `${run.page_check.pages} pages are as the guest wrote them`],
      ...run.levers.map((it) => [it.name, `${it.acted ? "acted" : "did not act"}: ${it.evidence}`]), ...run.notes.map((it) => ["note", it]),
      ["when", new Date(run.started * 1e3).toISOString()], ...Object.entries(run.settings), ...Object.entries(run.versions), ...Object.entries(run.hardware ?? {}), ["made by", run.made_by]]),
  )));
  document.title = title;
})();
