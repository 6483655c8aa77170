// The page: draws every figure from the blob, switches the axis, hides runs, reads values, copies the summary.

(() => {
  const root = document.documentElement;
  root.classList.add("js");
  const blob = JSON.parse(document.getElementById("blob").textContent);
  const state = { axis: "step", hidden: new Set(), paper: "#ffffff", ink: "#000000" };
  const single = blob.runs.length === 1;
  const groupOf = new Map(blob.groups.flatMap((g, i) => g.runs.map((r) => [r, i])));
  const live = document.getElementById("live");
  const lookOf = (group) => (blob.groups.length > 1 ? group : undefined);
  const FIRST = 0.2; // of the steps, of which no difference is drawn: they are largest there and say least
  const colour = (hex) => readable(hex, state.paper, state.ink);
  const span = (run) => { const xs = run.x[state.axis] || run.x.step; return [0, xs[xs.length - 1] || 1]; };
  const ends = (run, axis) => (run.x[axis] ? run.columns.map((i) => run.x[axis][i]) : null);

  const shown = { "%": percent, other: (v) => number(v) };
  const optionsOf = {
    loss: { log: true }, grad_norm: { log: true }, learning_rate: { zero: true }, tokens_per_second: { zero: true },
    max_vio: { zero: true }, dead: { zero: true, top: 0.05 }, effective_share: { zero: true, top: 1 }, dropped: { zero: true, top: 0.01 },
    saturation: { zero: true, top: 1 }, entropy: { zero: true }, experts_per_token: {},
  };

  /** What a figure shows, for the axis and the runs that are chosen; a text says why there is nothing. */
  const specs = {
    curve(figure) {
      const name = figure.dataset.metric, series = [], dots = [], bad = [];
      const means = blob.groups.map((group, i) => (state.hidden.has(i) ? null : meanOf(group, name)));
      blob.runs.forEach((run, i) => {
        const group = groupOf.get(i), points = run.curves[name];
        if (state.hidden.has(group) || !run.x[state.axis]) return;
        const c = colour(blob.groups[group].colour), several = blob.groups[group].runs.length > 1;
        if (points) {
          series.push({ name: single ? "" : run.name, colour: c, xs: run.x[state.axis], ys: points.mean, thin: Boolean(means[group]),
            look: means[group] ? undefined : lookOf(group),
            low: blob.runs.length < 4 ? points.low : null, high: blob.runs.length < 4 ? points.high : null });
        }
        if (name === "loss" && run.validation && run.validation.x[state.axis] && !several) {
          dots.push({ name: `${single ? "" : run.name + " "}validation`, colour: c, xs: run.validation.x[state.axis], ys: run.validation.value });
        }
        const broken = run.non_finite[name];
        if (broken) bad.push(...broken.steps.map((s) => place(run, s)).filter((v) => v !== null));
      });
      means.forEach((of, i) => { if (of) series.unshift({ name: `${blob.groups[i].name}, mean`, colour: colour(blob.groups[i].colour), look: lookOf(i), ...of }); });
      if (!series.length && !dots.length) return state.hidden.size ? "all runs are hidden" : "not logged";
      return { draw: lines, series, dots, bad, height: figure.classList.contains("wide") ? 270 : 176, ...optionsOf[name] };
    },
    gap() {
      if (!blob.comparison.one_unit) return "the runs' losses have different units";
      const of = (i) => blob.groups[i].runs.map((r) => blob.runs[r]).filter((run) => run.curves.loss && run.x[state.axis]);
      const base = blob.groups.findIndex((g) => g.name === blob.comparison.baseline), series = [];
      blob.groups.forEach((group, i) => {
        if (i === base || state.hidden.has(i)) return;
        const pairs = of(i).map((run) => [run, of(base).find((other) => other.seed === run.seed)]).filter(([, other]) => other);
        if (!pairs.length) return;
        const gaps = pairs.map(([run, other]) => run.x.step.map((s, n) => {
          const a = run.curves.loss.mean[n], b = between(other.x.step, other.curves.loss.mean, s);
          return a === null || a === undefined || b === null ? null : a - b;
        }));
        const steps = pairs[0][0].x.step, from = steps[0] + FIRST * (steps[steps.length - 1] - steps[0]);
        const found = pairs[0][0].x.step.map((s, n) => {
          const there = finite(gaps.map((g) => (g[n] === undefined ? null : g[n])));
          return s >= from && there.length === gaps.length ? interval(there) : null;
        });
        const there = found.map((of, n) => [of, pairs[0][0].x[state.axis][n]]).filter(([of]) => of);
        const part = (key) => there.map(([of]) => of[key]);
        if (!there.length) return;
        series.push({ name: group.name, colour: colour(group.colour), look: lookOf(i), xs: there.map(([, at]) => at), ys: part("mean"),
          ...(pairs.length > 1 ? { low: part("low"), high: part("high") } : {}) });
      });
      if (!series.length) return state.hidden.size ? "all other runs are hidden" : "no two runs of equal seed have logged a loss after the first fifth of training";
      return { draw: lines, series, level: 0, height: 190 };
    },
    metric(figure) {
      const run = blob.runs[figure.dataset.run], layer = run.layers[figure.dataset.layer], name = figure.dataset.metric;
      const c = colour(blob.groups[groupOf.get(Number(figure.dataset.run))].colour);
      if (name === "saturation") {
        if (!layer.saturation) return "not measured";
        const xs = layer.saturation.step.map((s) => place(run, s));
        return { draw: lines, series: [{ name: "", colour: c, xs, ys: layer.saturation.share, marks: true }], span: span(run), height: 150, ...optionsOf[name] };
      }
      if (!layer.series[name]) return "not logged";
      return { draw: lines, series: [{ name: "", colour: c, xs: ends(run, state.axis), ys: layer.series[name] }], span: span(run), height: 150, ...optionsOf[name] };
    },
    percentiles(figure) {
      const run = blob.runs[figure.dataset.run], p = run.percentiles[figure.dataset.metric];
      const c = colour(blob.groups[groupOf.get(Number(figure.dataset.run))].colour);
      const bands = [{ low: p["0"], high: p["100"], opacity: 0.16 }, { low: p["10"], high: p["90"], opacity: 0.28 }];
      return { draw: lines, series: [{ name: "median", colour: c, xs: ends(run, state.axis), ys: p["50"], bands }], span: span(run), height: 150, ...optionsOf[figure.dataset.metric] };
    },
    heat(figure) {
      const run = blob.runs[figure.dataset.run], layer = run.layers[figure.dataset.layer];
      if (!layer.load) return "load of each expert: not logged";
      return { draw: heat, load: layer.load, ends: ends(run, state.axis), height: 366 };
    },
    final() {
      if (!blob.comparison.one_unit) return "the runs' figures have different units: the table has them";
      const rows = blob.comparison.groups.map((g, i) => ({ name: g.name, look: i, bySeed: g.values, points: Object.values(g.values), mean: g.mean, half: g.half,
        colour: colour(blob.groups[i].colour), note: g.diverged ? `${g.diverged} diverged` : "" }));
      if (!rows.some((r) => r.points.length)) return "no run has its final figure yet";
      const seeds = [...new Set(rows.flatMap((r) => Object.keys(r.bySeed)))];
      return { draw: rowsOfPoints, rows, unit: blob.comparison.unit, joined: blob.comparison.why_not ? [] : seeds };
    },
    difference() {
      const rows = blob.comparison.groups.map((g, i) => ({ ...g, colour: colour(blob.groups[i].colour) })).filter((g) => g.difference).map((g) => ({
        name: g.name, look: 0, points: [], mean: g.difference.mean, half: g.difference.half, colour: g.colour,
        note: g.difference.half === null ? "one pair: no interval" : `${g.difference.pairs} pairs` }));
      if (!rows.length) return blob.comparison.why_not ? "no paired differences: the note says why" : "no pair of runs of equal seed is finished";
      return { draw: rowsOfPoints, rows, unit: blob.comparison.unit, zero: true };
    },
  };

  /** The mean of a group's seeds at each point, if it has several that share all points; else null. */
  function meanOf(group, name) {
    const runs = group.runs.map((r) => blob.runs[r]), first = runs[0];
    const same = (run) => run.x[state.axis] && run.curves[name] && run.x.step.length === first.x.step.length && run.x.step.every((s, n) => s === first.x.step[n]);
    if (runs.length < 2 || !runs.every(same)) return null;
    const over = (values) => (values.length === runs.length ? values.reduce((a, b) => a + b, 0) / values.length : null);
    return { xs: first.x.step.map((_, n) => over(finite(runs.map((run) => run.x[state.axis][n])))),
      ys: first.x.step.map((_, n) => over(finite(runs.map((run) => run.curves[name].mean[n] ?? null)))) };
  }

  /** Mean of paired differences and the ends of its 95% t-interval; of one the difference alone. */
  function interval(values) {
    const n = values.length, mean = values.reduce((a, b) => a + b, 0) / n;
    const half = n > 1 ? blob.comparison.t[n] * Math.sqrt(values.reduce((a, b) => a + (b - mean) ** 2, 0) / (n - 1) / n) : 0;
    return { mean, low: mean - half, high: mean + half };
  }

  /** Where a step lies on the axis: between points in proportion. */
  function place(run, step) {
    const xs = run.x[state.axis], steps = run.x.step;
    if (!xs || !steps.length) return null;
    const i = firstNotBelow(steps, step), before = i ? i - 1 : 0;
    if (steps[i] === steps[before]) return xs[i];
    const share = Math.min(Math.max((step - steps[before]) / (steps[i] - steps[before]), 0), 1);
    return xs[before] + (xs[i] - xs[before]) * share;
  }

  /** The value at a step, between points in proportion; null outside of them. */
  function between(steps, values, step) {
    if (!steps.length || step < steps[0] || step > steps[steps.length - 1]) return null;
    const i = firstNotBelow(steps, step), before = steps[i] === step || !i ? i : i - 1;
    if (values[i] === null || values[i] === undefined || values[before] === null) return null;
    return before === i ? values[i] : values[before] + ((values[i] - values[before]) * (step - steps[before])) / (steps[i] - steps[before]);
  }

  const drawn = new Map();

  function draw(figure) {
    const area = figure.querySelector(".area"), now = figure.querySelector(".now");
    if (!area.clientWidth) return;
    const spec = specs[figure.dataset.plot](figure), title = figure.querySelector(".what").textContent;
    drawn.delete(figure);
    now.textContent = "";
    area.removeAttribute("tabindex");
    area.removeAttribute("role");
    area.removeAttribute("aria-label");
    if (typeof spec === "string") return absent(area, spec);
    const axis = blob.runs.some((r) => r.x[state.axis]) ? state.axis : "step";
    const unit = blob.figures[figure.dataset.metric] ? blob.figures[figure.dataset.metric].unit : "";
    const show = unit === "%" ? percent : shown.other, label = unit === "%" ? percent : tick;
    const plot = spec.draw(area, { axis, title, show, label, ...spec });
    if (!plot) return absent(area, "no value is logged");
    area.tabIndex = 0;
    area.setAttribute("role", "group");
    area.setAttribute("aria-label", `${title}: arrow keys read values`);
    const last = plot.positions.length ? plot.positions[plot.positions.length - 1] : null;
    drawn.set(figure, { plot, at: null, row: plot.rows ? 0 : null, spec, last });
    rest(figure);
  }

  /** What a figure says when nobody points at it: its last value. */
  function rest(figure) {
    const { plot, spec, last } = drawn.get(figure), now = figure.querySelector(".now");
    figure.querySelector(".readout")?.remove();
    now.textContent = "";
    if (spec.draw === lines && spec.series.length === 1 && last !== null) {
      const there = spec.series[0].ys.filter((v) => v !== null && v !== undefined);
      const unit = blob.figures[figure.dataset.metric] ? blob.figures[figure.dataset.metric].unit : "";
      now.textContent = there.length ? (unit === "%" ? percent(there[there.length - 1]) : number(there[there.length - 1])) : "";
    }
    plot.unread();
  }

  const scope = (figure) => figure.closest(".layer, .small, .grid, .pair") || figure;

  /** Shows the values at x in a figure and, beside it, in its neighbours over the same axis. */
  function read(figure, at, row, spoken = false) {
    const one = drawn.get(figure);
    one.at = at;
    one.row = row;
    const found = one.plot.read(at, row);
    const many = found.rows.length > 1;
    const now = figure.querySelector(".now");
    const say = found.rows.map((r) => `${r.name ? r.name + " " : ""}${r.text}`).join("; ");
    now.textContent = many || one.plot.rows ? "" : say;
    figure.querySelector(".readout")?.remove();
    if (many || one.plot.rows) box(figure, one.plot, found, at);
    if (spoken) live.textContent = `${found.at}: ${say || "nothing"}`;
    if (one.spec.draw === rowsOfPoints) return;
    for (const other of scope(figure).querySelectorAll(".plot")) {
      const its = drawn.get(other);
      if (other === figure || !its || its.spec.draw === rowsOfPoints) continue;
      const there = its.plot.read(at, null);
      if (there.rows.length === 1) other.querySelector(".now").textContent = there.rows[0].text;
    }
  }

  function box(figure, plot, found, at) {
    const area = figure.querySelector(".area"), node = document.createElement("div"), head = document.createElement("b"), list = document.createElement("ul");
    node.className = "readout";
    head.textContent = found.at;
    for (const row of found.rows.slice(0, 10)) {
      const item = document.createElement("li");
      if (row.colour) item.append(swatch(row.colour));
      item.append(`${row.name ? row.name + " " : ""}${row.text}`);
      list.append(item);
    }
    if (found.rows.length > 10) list.append(Object.assign(document.createElement("li"), { textContent: `and ${found.rows.length - 10} more` }));
    node.append(head, list);
    area.append(node);
    const middle = (plot.box.left + plot.box.right) / 2;
    if (at !== null && plot.x(at) < middle) node.style.right = "0.4rem"; else node.style.left = `${plot.box.left + 6}px`;
  }

  function swatch(c, ring = false, look = undefined) {
    const wide = look === undefined ? 16 : 34;
    const svg = make("svg", { width: wide, height: 10, viewBox: `0 0 ${wide} 10`, "aria-hidden": "true", focusable: "false" });
    if (look !== undefined) {
      make("path", { d: `M0 5H${wide}`, stroke: c, "stroke-width": 2, "stroke-dasharray": DASHES[look % DASHES.length] }, null, svg);
      mark(look, wide / 2, 5, 3.4, c, svg);
      return svg;
    }
    if (ring) make("circle", { cx: 8, cy: 5, r: 3.4, fill: "none", stroke: c, "stroke-width": 1.7 }, null, svg);
    else make("rect", { x: 0, y: 3.5, width: 16, height: 3, fill: c }, null, svg);
    return svg;
  }

  function listen(figure) {
    const area = figure.querySelector(".area");
    const clear = () => { for (const f of scope(figure).querySelectorAll(".plot")) if (drawn.has(f)) rest(f); };
    area.addEventListener("pointermove", (event) => {
      const one = drawn.get(figure);
      if (!one) return;
      const frame = area.getBoundingClientRect(), px = event.clientX - frame.left, row = one.plot.rows ? one.plot.rowAt(event.clientY - frame.top) : null;
      if (!one.plot.positions.length) return read(figure, null, row);
      const { box: b, x } = one.plot, share = (Math.min(Math.max(px, b.left), b.right) - b.left) / (b.right - b.left);
      const at = x.lo + share * (x.hi - x.lo);
      read(figure, one.plot.rows ? at : one.plot.positions[nearest(one.plot.positions, at)], row);
    });
    area.addEventListener("pointerleave", clear);
    area.addEventListener("blur", clear);
    area.addEventListener("keydown", (event) => {
      const one = drawn.get(figure);
      if (!one) return;
      const positions = one.plot.positions, n = positions.length;
      let i = one.at === null || !n ? n : firstNotBelow(positions, one.at), row = one.row;
      const step = event.shiftKey ? 10 : 1;
      if (event.key === "Escape") return clear();
      if (event.key === "ArrowRight") i += step;
      else if (event.key === "ArrowLeft") i -= step;
      else if (event.key === "Home") i = 0;
      else if (event.key === "End") i = n - 1;
      else if (event.key === "ArrowUp" && one.plot.rows) row -= 1;
      else if (event.key === "ArrowDown" && one.plot.rows) row += 1;
      else return undefined;
      event.preventDefault();
      if (one.plot.rows) row = Math.min(Math.max(row, 0), one.plot.rows - 1);
      return read(figure, n ? positions[Math.min(Math.max(i, 0), n - 1)] : null, row, true);
    });
  }

  const figures = [...document.querySelectorAll(".plot")];
  const drawAll = () => figures.forEach(draw);

  function legend() {
    const node = document.getElementById("legend");
    node.replaceChildren();
    const first = colour(blob.groups[0].colour);
    if (!single) {
      blob.groups.forEach((group, i) => {
        const button = document.createElement("button");
        button.type = "button";
        button.setAttribute("aria-pressed", String(!state.hidden.has(i)));
        button.append(swatch(colour(group.colour), false, lookOf(i)), group.name);
        button.addEventListener("click", () => {
          if (!state.hidden.delete(i)) state.hidden.add(i);
          button.setAttribute("aria-pressed", String(!state.hidden.has(i)));
          document.querySelectorAll('.plot[data-plot="curve"], .plot[data-plot="gap"]').forEach(draw);
        });
        node.append(button);
      });
    }
    // Of several seeds the circles of validation are not drawn: they would cover each other.
    if (blob.groups.some((group) => group.runs.length === 1 && blob.runs[group.runs[0]].validation)) {
      for (const [text, ring] of single ? [["training", false], ["validation", true]] : [["validation", true]]) {
        const item = document.createElement("span");
        item.className = "key";
        item.append(swatch(single ? first : state.ink, ring), text);
        node.append(item);
      }
    }
  }

  function colours() {
    const style = getComputedStyle(root);
    state.paper = style.getPropertyValue("--paper").trim();
    state.ink = style.getPropertyValue("--ink").trim();
    legend();
    drawAll();
  }

  // Controls
  for (const input of document.querySelectorAll('input[name="axis"]')) {
    const runs = blob.runs.filter((run) => run.x.step.length);
    if (input.value !== "step" && !runs.some((run) => run.x[input.value])) {
      input.disabled = true;
      input.parentElement.title = input.value === "flops" ? "not known: FLOPs need the model pass, which was left out" : "not logged";
    }
    input.checked = input.value === "step";
    input.addEventListener("change", () => { state.axis = input.value; drawAll(); });
  }

  const theme = document.getElementById("theme"), systemDark = matchMedia("(prefers-color-scheme: dark)");
  const isDark = () => (root.dataset.theme ? root.dataset.theme === "dark" : systemDark.matches);
  const themed = () => { theme.setAttribute("aria-pressed", String(isDark())); colours(); };
  theme.addEventListener("click", () => { root.dataset.theme = isDark() ? "light" : "dark"; themed(); });
  systemDark.addEventListener("change", themed);

  document.getElementById("copy").addEventListener("click", async () => {
    const status = document.getElementById("copied"), text = document.getElementById("summary");
    try {
      await navigator.clipboard.writeText(text.textContent);
      status.textContent = "Summary copied.";
    } catch {
      document.getElementById("summary-box").open = true;
      const range = document.createRange();
      range.selectNodeContents(text);
      getSelection().removeAllRanges();
      getSelection().addRange(range);
      text.scrollIntoView({ block: "nearest" });
      let done = false;
      try { done = document.execCommand("copy"); } catch { /* the selection stays for the reader's own keys */ }
      status.textContent = done ? "Summary copied." : "The summary is selected: copy it with Ctrl+C.";
    }
  });

  // An answer to a link must be visible.
  addEventListener("hashchange", () => {
    const target = document.getElementById(decodeURIComponent(location.hash.slice(1)));
    if (target?.tagName === "DETAILS") target.open = true;
  });

  figures.forEach(listen);
  const widths = new Map();
  const watch = new ResizeObserver((entries) => {
    for (const { target, contentRect } of entries) {
      if (widths.get(target) === contentRect.width) continue;
      widths.set(target, contentRect.width);
      draw(target.closest(".plot"));
    }
  });
  themed();
  for (const figure of figures) {
    const area = figure.querySelector(".area");
    widths.set(area, area.clientWidth);
    watch.observe(area);
  }
  root.dataset.ready = "true";
})();
