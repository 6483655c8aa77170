// The figures, each an SVG of its own: lines over an axis, a heat map, rows of points with intervals.

const SVG = "http://www.w3.org/2000/svg";

function make(name, attributes = {}, text = null, parent = null) {
  const node = document.createElementNS(SVG, name);
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  if (text !== null) node.textContent = text;
  if (parent) parent.append(node);
  return node;
}

/** Pixels of a label as it will be drawn: what must not overlap or stick out. */
const textWidth = (() => {
  const ruler = document.createElement("canvas").getContext("2d");
  ruler.font = `11px ${getComputedStyle(document.body).fontFamily}`;
  return (text) => ruler.measureText(text).width;
})();

/** An empty drawing of the width of `area`, described for those who cannot see it. */
function canvas(area, height, description) {
  area.replaceChildren();
  const width = Math.floor(area.clientWidth);
  const svg = make("svg", { viewBox: `0 0 ${width} ${height}`, width, height, role: "img", "aria-label": description });
  area.append(svg);
  return { svg, width, height };
}

function absent(area, why) {
  area.replaceChildren();
  const note = document.createElement("div");
  note.className = "absent";
  note.textContent = why;
  area.append(note);
}

/** The horizontal axis with its ticks and title, which is returned: it says where a reader points. Labels never touch: ticks are as many as fit. */
function axisX(svg, box, x, axis) {
  const ticks = linearTicks(x.lo / axis.by, x.hi / axis.by, Math.max(2, Math.floor((box.right - box.left) / 75)));
  make("line", { class: "baseline", x1: box.left, x2: box.right, y1: box.bottom + 0.5, y2: box.bottom + 0.5 }, null, svg);
  let end = -Infinity;
  for (const t of ticks) {
    const at = x(t * axis.by), half = textWidth(tick(t)) / 2;
    const middle = Math.min(Math.max(at, half), box.width - half);
    if (middle - half < end + 6) continue;
    make("line", { class: "baseline", x1: at, x2: at, y1: box.bottom, y2: box.bottom + 4 }, null, svg);
    make("text", { x: middle, y: box.bottom + 16, "text-anchor": "middle" }, tick(t), svg);
    end = middle + half;
  }
  return make("text", { class: "axis-title", x: box.right, y: box.bottom + 31, "text-anchor": "end" }, axis.title, svg);
}

// What tells groups apart without their colour, as in pictures: looks.py. 7 marks and 6 lines: 42 groups differ.
const DASHES = ["none", "7 4", "8 3 2 3", "2 3", "9 2 2 2 2 2", "14 4"];
const MARKS = [
  (r) => `M${-r} 0a${r} ${r} 0 1 0 ${2 * r} 0a${r} ${r} 0 1 0 ${-2 * r} 0Z`,
  (r) => `M${-r} ${-r}H${r}V${r}H${-r}Z`,
  (r) => `M0 ${-1.2 * r}L${1.15 * r} ${r}H${-1.15 * r}Z`,
  (r) => `M0 ${-1.3 * r}L${1.3 * r} 0L0 ${1.3 * r}L${-1.3 * r} 0Z`,
  (r) => `M0 ${1.2 * r}L${1.15 * r} ${-r}H${-1.15 * r}Z`,
  (r) => `M${-r * 0.4} ${-1.2 * r}h${r * 0.8}v${r * 0.8}h${r * 0.8}v${r * 0.8}h${-r * 0.8}v${r * 0.8}h${-r * 0.8}v${-r * 0.8}h${-r * 0.8}v${-r * 0.8}h${r * 0.8}Z`,
  (r) => `M${-1.2 * r} ${-0.6 * r}L${-0.6 * r} ${-1.2 * r}L0 ${-0.6 * r}L${0.6 * r} ${-1.2 * r}L${1.2 * r} ${-0.6 * r}L${0.6 * r} 0L${1.2 * r} ${0.6 * r}L${0.6 * r} ${1.2 * r}L0 ${0.6 * r}L${-0.6 * r} ${1.2 * r}L${-1.2 * r} ${0.6 * r}L${-0.6 * r} 0Z`,
];

function mark(n, x, y, r, colour, svg) {
  make("path", { class: "mark", d: MARKS[n % MARKS.length](r), transform: `translate(${x} ${y})`, fill: colour, stroke: "var(--paper)", "stroke-width": 0.6 }, null, svg);
}

/** A path through points, broken where one is missing. */
function path(xs, ys, x, y) {
  let d = "", pen = "M";
  for (let i = 0; i < xs.length; i++) {
    const v = ys[i];
    if (v === null || v === undefined) { pen = "M"; continue; }
    d += `${pen}${x(xs[i]).toFixed(1)} ${y(v).toFixed(1)}`;
    pen = "L";
  }
  return d;
}

function band(xs, low, high, x, y) {
  const there = xs.map((_, i) => i).filter((i) => low[i] !== null && low[i] !== undefined && high[i] !== null);
  if (there.length < 2) return "";
  const forth = there.map((i) => `${x(xs[i]).toFixed(1)} ${y(high[i]).toFixed(1)}`);
  const back = there.reverse().map((i) => `${x(xs[i]).toFixed(1)} ${y(low[i]).toFixed(1)}`);
  return `M${forth.join("L")}L${back.join("L")}Z`;
}

/**
 * Lines over an axis. spec: axis (name), series [{name, colour, xs, ys, low, high, bands, thin, look (number of the group)}],
 * dots [{name, colour, xs, ys}], bad [x], span [least x, most], log, zero, top, level (a line at that value), show (value -> text),
 * label (value -> tick), height, title.
 * Returns {read(x) -> {x, rows}, positions, unread} or null if there is nothing to draw.
 */
function lines(area, spec) {
  const { series, dots = [], log = false } = spec;
  const clean = (values) => values.map((v) => (v === undefined || (log && v !== null && v <= 0) ? null : v));
  const all = [...series, ...dots];
  const ys = all.flatMap((s) => [...clean(s.ys), ...(s.low ? clean(s.low) : []), ...(s.high ? clean(s.high) : []),
    ...(s.bands || []).flatMap((b) => [...b.low, ...b.high])]);
  if (spec.level !== undefined) ys.push(spec.level);
  const range = domain(ys, spec), xs = finite(all.flatMap((s) => s.xs));
  if (!range || !xs.length) return null;
  const most = xs.reduce((a, b) => Math.max(a, b), 0), least = xs.reduce((a, b) => Math.min(a, b), most);
  const axis = AXES[spec.axis](spec.span ? spec.span[1] : most);
  const { svg, width, height } = canvas(area, spec.height, describe(spec, all, axis));
  const ticks = (log ? logTicks : linearTicks)(range[0], range[1], Math.max(2, Math.floor((height - 46) / 30)));
  const label = spec.label || tick;
  const left = Math.max(...ticks.map((t) => textWidth(label(t))), 18) + 8;
  const box = { left, right: width - 6, top: 8, bottom: height - 36, width };
  const span = spec.span || (most > least ? [Math.min(least, most > 4 * least ? 0 : least), most] : [least * 0.5, most * 1.5 || 1]);
  const x = Object.assign(scale(span, [box.left, box.right]), { lo: span[0], hi: span[1] });
  const y = scale(range, [box.bottom, box.top], log);
  for (const t of ticks) {
    make("line", { class: t === 0 && range[0] < 0 ? "zero" : "gridline", x1: box.left, x2: box.right, y1: y(t), y2: y(t) }, null, svg);
    make("text", { x: box.left - 7, y: y(t) + 4, "text-anchor": "end" }, label(t), svg);
  }
  if (spec.level !== undefined) make("line", { class: "level", x1: box.left, x2: box.right, y1: y(spec.level), y2: y(spec.level) }, null, svg);
  const title = axisX(svg, box, x, axis);
  for (const s of [...series].sort((a, b) => Boolean(b.thin) - Boolean(a.thin))) {
    for (const b of s.bands || []) make("path", { class: "mark", d: band(s.xs, b.low, b.high, x, y), fill: s.colour, "fill-opacity": b.opacity }, null, svg);
    if (s.low && s.high) make("path", { d: band(s.xs, clean(s.low), clean(s.high), x, y), fill: s.colour, "fill-opacity": 0.2 }, null, svg);
    const values = clean(s.ys), number = finite(values).length;
    if (number === 1 || (s.marks && number < 40)) {
      s.xs.forEach((v, i) => { if (values[i] !== null && values[i] !== undefined) make("circle", { class: "mark", cx: x(v), cy: y(values[i]), r: 3, fill: s.colour }, null, svg); });
    }
    if (number > 1) make("path", { class: "mark", d: path(s.xs, values, x, y), fill: "none", stroke: s.colour, "stroke-width": s.thin ? 1.1 : 1.8, "stroke-opacity": s.thin ? 0.45 : 1, "stroke-linejoin": "round", "stroke-dasharray": s.look === undefined ? "none" : DASHES[s.look % DASHES.length] }, null, svg);
    if (s.look !== undefined) {
      const there = values.map((_, i) => i).filter((i) => values[i] !== null), every = Math.max(Math.floor(there.length / 6), 1);
      there.filter((_, n) => n % every === 0).forEach((i) => mark(s.look, x(s.xs[i]), y(values[i]), 3, s.colour, svg));
    }
  }
  for (const s of dots) {
    const r = s.xs.length > 60 ? 2.2 : 3.4;
    s.xs.forEach((v, i) => { if (s.ys[i] !== null && (!log || s.ys[i] > 0)) make("circle", { class: "mark", cx: x(v), cy: y(s.ys[i]), r, fill: "var(--paper)", stroke: s.colour, "stroke-width": 1.7 }, null, svg); });
  }
  for (const v of spec.bad || []) {
    const at = x(v);
    if (at >= box.left && at <= box.right) make("path", { class: "bad", d: `M${at - 3} ${box.top - 3}l6 6m0 -6l-6 6` }, null, svg);
  }
  const cursor = make("line", { class: "cursor", y1: box.top, y2: box.bottom, visibility: "hidden" }, null, svg);
  const longest = all.reduce((a, b) => (b.xs.length > a.xs.length ? b : a));
  return {
    box, x, axis, positions: longest.xs,
    read(at) {
      cursor.setAttribute("visibility", "visible");
      cursor.setAttribute("x1", x(at));
      cursor.setAttribute("x2", x(at));
      title.textContent = where(axis, at);
      return { at: where(axis, at), rows: all.map((s) => {
        const i = nearest(s.xs, at), v = s.ys[i];
        const near = Math.abs(x(s.xs[i]) - x(at)) < 12 && v !== null && v !== undefined;
        const range = s.low && near && s.low[i] !== s.high[i] ? ` (${spec.show(s.low[i])} to ${spec.show(s.high[i])})` : "";
        return near ? { name: s.name, colour: s.colour, text: spec.show(v) + range } : null;
      }).filter(Boolean) };
    },
    unread() { cursor.setAttribute("visibility", "hidden"); title.textContent = axis.title; },
  };
}

const where = (axis, at) => `${axis.title} ${number(at / axis.by)}`;

function describe(spec, all, axis) {
  const parts = all.slice(0, 6).map((s) => {
    const there = finite(s.ys);
    return there.length ? `${s.name || spec.title} from ${spec.show(there[0])} to ${spec.show(there[there.length - 1])}` : "";
  }).filter(Boolean);
  return `${spec.title} by ${axis.title}: ${parts.join("; ")}${all.length > 6 ? ` and ${all.length - 6} more` : ""}`;
}

function nearest(values, at) {
  let lo = 0, hi = values.length - 1;
  while (hi - lo > 1) {
    const middle = (lo + hi) >> 1;
    if (values[middle] < at) lo = middle; else hi = middle;
  }
  return Math.abs(values[lo] - at) <= Math.abs(values[hi] - at) ? lo : hi;
}

/** Load of each expert over time. spec: axis, ends (right end of each column), load, title, height. */
function heat(area, spec) {
  const { load, ends } = spec, rows = load.even.length, most = Math.max(load.largest, 2);
  const axis = AXES[spec.axis](ends[ends.length - 1]);
  const final = load.last.map((v, e) => [v, load.experts[e]]).filter(([v]) => v !== null).sort((a, b) => b[0] - a[0]);
  const { svg, width, height } = canvas(area, spec.height, `${spec.title} by ${axis.title}: ${rows} rows; in the end `
    + (final.length ? `expert ${final[0][1]} has ${number(final[0][0], 3)} and expert ${final[final.length - 1][1]} ${number(final[final.length - 1][0], 3)} times an even share` : "unknown"));
  const left = Math.max(...load.experts.map(textWidth), textWidth("expert")) + 8;
  const box = { left, right: width - 6, top: 18, bottom: height - 64, width };
  const start = ends.length > 1 && ends[0] * 4 > ends[ends.length - 1] && ends[0] > ends[1] - ends[0] ? 2 * ends[0] - ends[1] : 0;
  const x = Object.assign(scale([start, ends[ends.length - 1]], [box.left, box.right]), { lo: start, hi: ends[ends.length - 1] });
  const tall = (box.bottom - box.top) / rows, y = (e) => box.top + e * tall;
  const paths = Array.from({ length: LEVELS + 1 }, () => "");
  load.even.forEach((row, e) => {
    let from = 0;
    const level = (i) => (row[i] === null || row[i] === undefined ? -1 : Math.round(Math.min(row[i] / most, 1) * LEVELS));
    for (let i = 0; i < ends.length; i++) {
      if (i + 1 < ends.length && level(i + 1) === level(i)) continue;
      const a = x(from ? ends[from - 1] : start), b = x(ends[i]);
      if (level(i) >= 0) paths[level(i)] += `M${a.toFixed(2)} ${y(e).toFixed(2)}H${b.toFixed(2)}V${y(e + 1).toFixed(2)}H${a.toFixed(2)}Z`;
      from = i + 1;
    }
  });
  paths.forEach((d, i) => { if (d) make("path", { class: "mark", d, fill: ramp(i / LEVELS), "shape-rendering": "crispEdges" }, null, svg); });
  const every = Math.ceil(13 / tall);
  make("text", { x: box.left - 6, y: 11, "text-anchor": "end" }, "expert", svg);
  for (let e = 0; e < rows; e += every) make("text", { x: box.left - 6, y: y(e + 0.5) + 4, "text-anchor": "end" }, load.experts[e], svg);
  const title = axisX(svg, box, x, axis);
  key(svg, box, most, height);
  const cell = make("rect", { class: "cell-cursor", visibility: "hidden" }, null, svg);
  return {
    box, x, axis, rows, positions: ends, rowAt: (py) => Math.min(Math.max(Math.floor((py - box.top) / tall), 0), rows - 1),
    read(at, e = null) {
      const i = Math.min(firstNotBelow(ends, at), ends.length - 1), a = x(i ? ends[i - 1] : start), b = x(ends[i]);
      const whole = e === null;
      for (const [k, v] of Object.entries({ x: a, width: Math.max(b - a, 1), y: whole ? box.top : y(e), height: whole ? box.bottom - box.top : tall, visibility: "visible" })) cell.setAttribute(k, v);
      title.textContent = where(axis, ends[i]);
      return { at: where(axis, ends[i]), rows: whole ? [] : [{ name: `expert ${load.experts[e]}`, text: `${number(load.even[e][i], 3)} × even` }] };
    },
    unread() { cell.setAttribute("visibility", "hidden"); title.textContent = axis.title; },
  };
}

function firstNotBelow(values, at) {
  const i = values.findIndex((v) => v >= at - 1e-9);
  return i < 0 ? values.length - 1 : i;
}

/** What the colours of a heat map mean. */
function key(svg, box, most, height) {
  const wide = Math.min(170, box.right - box.left), top = height - 24;
  for (let i = 0; i < LEVELS; i++) make("rect", { x: box.left + (i * wide) / LEVELS, y: top, width: wide / LEVELS + 0.5, height: 8, fill: ramp(i / (LEVELS - 1)) }, null, svg);
  const even = box.left + wide / most, end = `${number(most, 2)} ×`, middle = most < 1.6 ? "1" : "1 = even";
  make("line", { class: "cursor", x1: even, x2: even, y1: top - 3, y2: top + 11 }, null, svg);
  make("text", { x: box.left, y: top + 20, "text-anchor": "middle" }, "0", svg);
  make("text", { x: even, y: top + 20, "text-anchor": "middle" }, middle, svg);
  if (box.left + wide - textWidth(end) / 2 > even + textWidth(middle) / 2 + 6) make("text", { x: box.left + wide, y: top + 20, "text-anchor": "middle" }, end, svg);
}

/** Rows of points with intervals. spec: rows [{name, note, colour, look, points, mean, half}], zero, unit, joined. */
function rowsOfPoints(area, spec) {
  const values = spec.rows.flatMap((r) => [...r.points, r.mean, ...(r.half === null ? [] : [r.mean - r.half, r.mean + r.half])]);
  const range = domain(spec.zero ? [...values, 0] : values);
  if (!finite(values).length) return null;
  const longest = Math.max(...spec.rows.map((r) => Math.max(1.08 * textWidth(r.name), textWidth(r.note || "")))), beside = area.clientWidth > 430 && longest < area.clientWidth * 0.34;
  const tall = beside ? 38 : 46, height = spec.rows.length * tall + 52;
  const { svg, width } = canvas(area, height, `${spec.title}, ${spec.unit}: ` + spec.rows.map((r) => `${r.name} ${figure(r.mean)}${r.half === null ? "" : ` ± ${figure(r.half)}`}`).join("; "));
  const box = { left: beside ? longest + 18 : 8, right: width - 10, top: 6, bottom: height - 40, width };
  const x = Object.assign(scale(range, [box.left, box.right]), { lo: range[0], hi: range[1] });
  for (const t of linearTicks(range[0], range[1], Math.max(2, Math.floor((box.right - box.left) / 75)))) make("line", { class: "gridline", x1: x(t), x2: x(t), y1: box.top, y2: box.bottom }, null, svg);
  axisX(svg, box, x, { by: 1, title: spec.unit });
  if (spec.zero) make("line", { class: "zero", x1: x(0), x2: x(0), y1: box.top, y2: box.bottom }, null, svg);
  const middle = (i) => box.top + i * tall + (beside ? tall / 2 : tall / 2 + 9);
  for (const seed of spec.joined || []) {
    const at = spec.rows.map((r, i) => [r.bySeed[seed], i]).filter(([v]) => v !== undefined && v !== null);
    if (at.length > 1) make("path", { d: at.map(([v, i], n) => `${n ? "L" : "M"}${x(v)} ${middle(i)}`).join(""), fill: "none", class: "gridline", "shape-rendering": "auto" }, null, svg);
  }
  spec.rows.forEach((r, i) => {
    const at = middle(i);
    make("text", { class: "row-name", x: beside ? box.left - 12 : box.left, y: beside ? at + (r.note ? -2 : 4) : at - 14, "text-anchor": beside ? "end" : "start" }, r.name, svg);
    if (r.note) make("text", { x: beside ? box.left - 12 : box.right, y: beside ? at + 11 : at - 14, "text-anchor": "end" }, r.note, svg);
    for (const v of finite(r.points)) mark(r.look, x(v), at, 3.2, r.colour, svg);
    if (r.mean === null) return;
    if (r.half !== null) make("path", { class: "mark", d: `M${x(r.mean - r.half)} ${at - 4}v8m0 -4H${x(r.mean + r.half)}m0 -4v8`, stroke: r.colour, "stroke-width": 1.8, fill: "none" }, null, svg);
    make("rect", { class: "mark", x: x(r.mean) - 1.6, y: at - 8, width: 3.2, height: 16, fill: r.colour }, null, svg);
  });
  const cursor = make("rect", { class: "cell-cursor", x: 0.75, width: width - 1.5, height: tall - 3, visibility: "hidden" }, null, svg);
  return {
    box, x, rows: spec.rows.length, positions: [], rowAt: (py) => Math.min(Math.max(Math.floor((py - box.top) / tall), 0), spec.rows.length - 1),
    read(_, e) {
      const r = spec.rows[e || 0];
      for (const [k, v] of Object.entries({ y: box.top + (e || 0) * tall + 1, visibility: "visible" })) cursor.setAttribute(k, v);
      return { at: r.name, rows: [{ name: "", text: `${spec.zero && r.mean > 0 ? "+" : ""}${figure(r.mean)}${r.half === null ? "" : ` ± ${figure(r.half)}`} ${spec.unit}` }] };
    },
    unread() { cursor.setAttribute("visibility", "hidden"); },
  };
}
