"use strict";
// Ticks, numbers, colours: what figures are measured with. No element of the page is named here.

const finite = (values) => values.filter((v) => v !== null && Number.isFinite(v));

/** About `count` round numbers from lo to hi. */
function linearTicks(lo, hi, count) {
  const raw = (hi - lo) / Math.max(count, 1), power = 10 ** Math.floor(Math.log10(raw));
  const step = [1, 2, 2.5, 5, 10].map((m) => m * power).find((s) => s >= raw * 0.999);
  const ticks = [];
  for (let i = Math.ceil(lo / step - 1e-9); i * step <= hi + step * 1e-9; i++) ticks.push(Number((i * step).toPrecision(12)));
  return ticks;
}

/** At most `count` of 1, 2, 5 x 10^n from lo to hi; round numbers where that leaves fewer than three. */
function logTicks(lo, hi, count) {
  for (const digits of [[1, 1.5, 2, 3, 4, 5, 6, 8], [1, 2, 3, 5], [1, 3], [1]]) {
    const ticks = [];
    for (let p = Math.floor(Math.log10(lo)); p <= Math.ceil(Math.log10(hi)); p++) {
      for (const d of digits) {
        const v = Number((d * 10 ** p).toPrecision(6));
        if (v >= lo * 0.999 && v <= hi * 1.001) ticks.push(v);
      }
    }
    if (ticks.length >= 3 && ticks.length <= count) return ticks;
  }
  if (hi / lo < 30) return linearTicks(lo, hi, count).filter((v) => v > 0);
  const first = Math.ceil(Math.log10(lo)), last = Math.floor(Math.log10(hi)), by = Math.max(1, Math.ceil((last - first) / count));
  const ticks = [];
  for (let p = first; p <= last; p += by) ticks.push(Number((10 ** p).toPrecision(6)));
  return ticks;
}

/** [lo, hi] of y, with some air; from zero where `zero` asks for it. */
function domain(values, { log = false, zero = false, top = null } = {}) {
  const there = finite(values).filter((v) => !log || v > 0);
  if (!there.length) return null;
  let lo = there[0], hi = there[0];
  for (const v of there) { if (v < lo) lo = v; if (v > hi) hi = v; }
  if (log) return hi > lo * 1.0001 ? [lo / (hi / lo) ** 0.04, hi * (hi / lo) ** 0.04] : [lo / 1.2, hi * 1.2];
  if (zero) lo = Math.min(lo, 0);
  if (top !== null) hi = Math.max(hi, top);
  if (hi - lo < Math.abs(hi) * 1e-4 + 1e-12) {
    const pad = Math.abs(hi) * 0.1 || 1;
    return [zero && lo >= 0 ? 0 : lo - pad, hi + pad];
  }
  const air = (hi - lo) * 0.06;
  return [zero && lo >= 0 ? 0 : lo - air, hi + air];
}

function scale([lo, hi], [from, to], log = false) {
  const f = log ? Math.log : (v) => v, a = f(lo), b = f(hi);
  return (v) => from + (b === a ? 0.5 : (f(v) - a) / (b - a)) * (to - from);
}

const trimmed = (text) => (text.includes(".") ? text.replace(/\.?0+$/, "") : text);

/** Four digits for a reader: 0.01234, 1,234, 1.2e-7. */
function number(v, digits = 4) {
  if (v === null || v === undefined || !Number.isFinite(v)) return "–";
  if (v === 0) return "0";
  const size = Math.abs(v);
  if (size < 1e-4 || size >= 1e9) return trimmed(v.toExponential(digits - 1).split("e")[0]) + "e" + Number(v.toExponential().split("e")[1]);
  if (size >= 1000) return Math.round(v).toLocaleString("en-US");
  return trimmed(v.toPrecision(digits));
}

/** A final figure or a difference of such, with the digits of the table and of `compare`. */
const figure = (v) => (v === null || v === undefined ? "–" : v.toFixed(4));

/** As short as a tick's label may be: 20k, 0.5, 3e-4. */
function tick(v) {
  if (v === 0) return "0";
  const size = Math.abs(v);
  if (size >= 1e9) return trimmed((v / 1e9).toPrecision(6)) + "G";
  if (size >= 1e6) return trimmed((v / 1e6).toPrecision(6)) + "M";
  if (size >= 1e4) return trimmed((v / 1e3).toPrecision(6)) + "k";
  if (size < 1e-3) return trimmed(v.toExponential(2).split("e")[0]) + "e" + Number(v.toExponential().split("e")[1]);
  return trimmed(v.toPrecision(6));
}

const percent = (v) => (v === null ? "–" : trimmed((100 * v).toPrecision(3)) + "%");

const AXES = {
  step: () => ({ by: 1, title: "step" }),
  tokens: (most) => by1000(most, "tokens", ["", ", thousands", ", millions", ", billions", ", trillions"]),
  flops: (most) => by1000(most, "", ["FLOPs", "kFLOPs", "MFLOPs", "GFLOPs", "TFLOPs", "PFLOPs", "EFLOPs", "ZFLOPs", "YFLOPs"]),
  seconds: (most) => {
    const [by, title] = most > 3 * 3600 ? [3600, "hours"] : most > 180 ? [60, "minutes"] : [1, "seconds"];
    return { by, title: `training time, ${title}` };
  },
};

function by1000(most, name, units) {
  const n = Math.min(Math.max(Math.floor(Math.log10(most || 1) / 3), 0), units.length - 1);
  return { by: 1000 ** n, title: name + units[n] };
}

const channels = (hex) => [1, 3, 5].map((i) => parseInt(hex.slice(i, i + 2), 16));
const hexOf = (rgb) => "#" + rgb.map((v) => Math.round(v).toString(16).padStart(2, "0")).join("");

function luminance(hex) {
  const [r, g, b] = channels(hex).map((v) => v / 255).map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4));
  return 0.2126 * r + 0.7152 * g + 0.0722 * b;
}

function contrast(a, b) {
  const [x, y] = [luminance(a), luminance(b)].sort((p, q) => q - p);
  return (x + 0.05) / (y + 0.05);
}

/** The colour, moved towards `ink` until it stands out on `paper` as graphics must, and a bit more: 3.6 to 1. */
function readable(hex, paper, ink) {
  let found = hex;
  for (let share = 0.1; share < 1 && contrast(found, paper) < 3.6; share += 0.1) {
    const to = channels(ink);
    found = hexOf(channels(hex).map((v, i) => v + (to[i] - v) * share));
  }
  return found;
}

// viridis (van der Walt and Smith 2015), ten of its colours: even steps of lightness, for every kind of sight.
const VIRIDIS = ["#440154", "#482878", "#3e4989", "#31688e", "#26828e", "#1f9e89", "#35b779", "#6dcd59", "#b4de2c", "#fde725"].map(channels);
const LEVELS = 40;

function ramp(share) {
  const at = Math.min(Math.max(share, 0), 1) * (VIRIDIS.length - 1), i = Math.min(Math.floor(at), VIRIDIS.length - 2);
  return hexOf(VIRIDIS[i].map((v, c) => v + (VIRIDIS[i + 1][c] - v) * (at - i)));
}
