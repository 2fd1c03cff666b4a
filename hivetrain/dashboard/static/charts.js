// Charts by uPlot, each with a sentence that says the same and a table of its points.

import { element, write } from "./table.js";
import * as format from "./format.js";

const POINTS = 800;
const HEIGHT = 220;
const TABLE_ROWS = 30;

const color = (name) => getComputedStyle(document.documentElement).getPropertyValue(name).trim();
const line = (label, stroke, show, extra = {}) => ({ label, stroke, show, ...extra });

const CHARTS = [
  {
    id: "loss", title: "Loss over swarm epochs", source: "epochs", x: "epoch",
    columns: ["loss", "heldout_loss", "loss_low", "loss_high"],
    lines: [
      line("training loss", "--c1", format.loss, { width: 2 }),
      line("held-out loss", "--c2", format.loss, { width: 2, spanGaps: true, points: { show: true, size: 6 } }),
      line("lower quartile", "--c1", format.loss, { width: 0.5 }),
      line("upper quartile", "--c1", format.loss, { width: 0.5 }),
    ],
    band: true,
    summary: (last) => `Epoch ${format.integer(last.epoch)}: training loss ${format.loss(last.loss)}, ` +
      `held-out loss ${format.loss(last.heldout_loss)}.`,
  },
  {
    id: "tokens", title: "Tokens per second", source: "ticks", x: "at", time: true, columns: ["tokens_per_s"],
    lines: [line("tokens/s", "--c3", format.large, { width: 2 })],
    floor: true,
    summary: (last) => `${format.large(last.tokens_per_s)} tokens per second at ${format.clock(last.at)}.`,
  },
  {
    id: "peers", title: "Peers, with joins and losses", source: "ticks", x: "at", time: true,
    columns: ["peers", "joined", "gone"],
    lines: [
      line("peers", "--c1", format.integer, { width: 2 }),
      line("joined", "--c3", format.integer, { paths: () => null, points: { show: true, size: 9 } }),
      line("left or lost", "--c2", format.integer, { paths: () => null, points: { show: true, size: 9 } }),
    ],
    floor: true,
    summary: (last) => `${format.integer(last.peers)} peers at ${format.clock(last.at)}.`,
  },
  {
    id: "exchange", title: "Exchange", source: "epochs", x: "epoch", columns: ["exchange_s", "group_size"],
    lines: [
      line("seconds", "--c1", format.seconds, { width: 2 }),
      line("group size", "--c2", format.integer, { width: 1.5, scale: "group" }),
    ],
    floor: true,
    summary: (last) => `Epoch ${format.integer(last.epoch)}: ${format.seconds(last.exchange_s)}, ` +
      `group of ${format.integer(last.group_size)}.`,
  },
];

/** All charts; `load` asks the server for the past, `add` takes what is new. */
export class Charts {
  constructor(host) {
    this.data = { epochs: { epoch: [] }, ticks: { at: [] } };
    this.views = CHARTS.map((chart) => new View(chart, host));
    this.loading = null;
    new ResizeObserver(() => this.views.forEach((view) => view.resize())).observe(host);
  }

  async load() {
    const answer = await fetch(`/api/series?points=${POINTS}`);
    if (!answer.ok) throw new Error(`/api/series: ${answer.status}`);
    const began = performance.now();
    this.data = await answer.json();
    this.drawAll();
    performance.measure("charts-drawn", { start: began });
  }

  add(lists) {
    this.append("epochs", "epoch", lists.epochs || []);
    this.append("ticks", "at", lists.ticks || []);
    const isLong = this.data.epochs.epoch.length > 1.5 * POINTS || this.data.ticks.at.length > 1.5 * POINTS;
    if (isLong && !this.loading) this.loading = this.load().catch(() => {}).finally(() => { this.loading = null; });
    this.drawAll(lists);
  }

  append(name, x, entries) {
    const columns = this.data[name];
    for (const entry of entries) {
      const xs = columns[x];
      let index = xs.length - 1;
      while (index >= 0 && xs[index] > entry[x]) index -= 1;
      if (index < 0 || xs[index] !== entry[x]) {
        if (index !== xs.length - 1) continue; // behind what is shown: part of a point that stands for several
        index = xs.length;
      }
      for (const [key, column] of Object.entries(columns)) if (key !== "width") column[index] = entry[key] ?? null;
    }
  }

  drawAll(lists = null) {
    for (const view of this.views) if (!lists || (lists[view.chart.source] || []).length) view.draw(this.data);
  }

  restyle() {
    for (const view of this.views) view.rebuild(this.data);
  }
}

class View {
  constructor(chart, host) {
    this.chart = chart;
    this.plot = element("div", { class: "plot", id: `plot-${chart.id}`, role: "img", "aria-label": chart.title });
    this.summary = element("p", { id: `summary-${chart.id}`, text: "No data yet." });
    this.body = element("tbody");
    const heads = [chart.time ? "time" : "epoch", ...chart.lines.map((entry) => entry.label)];
    const row = element("tr", {}, ...heads.map((text) => element("th", { scope: "col", text })));
    const caption = element("caption", { text: `${chart.title}: the last points` });
    const table = element("table", {}, caption, element("thead", {}, row), this.body);
    const region = element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${chart.title}, table` }, table);
    this.details = element("details", {}, element("summary", { text: `${chart.title} as a table` }), region);
    this.details.addEventListener("toggle", () => this.fill());
    host.append(element("figure", {}, element("figcaption", {}, element("h3", { text: chart.title })), this.plot, this.summary, this.details));
    this.uplot = null;
  }

  draw(data) {
    this.columns = data[this.chart.source];
    const xs = this.columns[this.chart.x];
    if (!xs.length) return;
    if (!this.uplot) this.build();
    this.uplot.setData(this.series());
    const last = Object.fromEntries(Object.keys(this.columns).map((name) => [name, lastKnown(this.columns[name])]));
    const main = this.columns[this.chart.columns[0]];
    last[this.chart.x] = lastKnown(xs.map((x, index) => (main[index] === null ? null : x))) ?? last[this.chart.x];
    const text = this.chart.summary(last);
    write(this.summary, text);
    this.plot.setAttribute("aria-label", `${this.chart.title}. ${text}`);
    if (this.details.open) this.fill();
  }

  rebuild(data) {
    if (this.uplot) this.uplot.destroy();
    this.uplot = null;
    this.draw(data);
  }

  resize() {
    if (this.uplot) this.uplot.setSize({ width: this.plot.clientWidth, height: HEIGHT });
  }

  series() {
    const { columns, chart } = this;
    const marks = (name) => columns[name].map((count, index) => (count ? columns.peers[index] : null));
    const isMark = (name) => name === "joined" || name === "gone";
    return [columns[chart.x], ...chart.columns.map((name) => (isMark(name) ? marks(name) : columns[name]))];
  }

  build() {
    const { chart } = this;
    const stroke = color("--soft");
    const axis = { stroke, grid: { stroke: color("--grid"), width: 1 }, ticks: { stroke: color("--grid") } };
    const lines = chart.lines.map((entry) => ({
      ...entry, stroke: color(entry.stroke), show: true, value: (_, value) => entry.show(value),
      points: entry.points ? { ...entry.points, stroke: color(entry.stroke), fill: color(entry.stroke) } : { show: false },
    }));
    const figures = { ...axis, size: 60, values: (_, ticks) => ticks.map(format.tick) };
    const hasGroup = chart.lines.some((entry) => entry.scale === "group");
    const range = (_, low, high) => [0, Math.max(1e-9, high ?? 1) * 1.1];
    this.uplot = new window.uPlot({
      width: this.plot.clientWidth, height: HEIGHT,
      scales: { x: { time: Boolean(chart.time) }, ...(chart.floor ? { y: { range }, group: { range } } : {}) },
      axes: [axis, figures, ...(hasGroup ? [{ ...figures, scale: "group", side: 1, grid: { show: false } }] : [])],
      series: [{ label: chart.time ? "time" : "epoch" }, ...lines],
      bands: chart.band ? [{ series: [4, 3], fill: color("--c1-fill") }] : [],
      legend: { live: true },
    }, this.series(), this.plot);
  }

  fill() {
    if (!this.details.open || !this.columns) return;
    const { chart, columns } = this;
    const xs = columns[chart.x];
    const rows = [];
    for (let index = xs.length - 1; index >= Math.max(0, xs.length - TABLE_ROWS); index -= 1) {
      const texts = chart.columns.map((name, column) => chart.lines[column].show(columns[name][index]));
      const head = element("th", { scope: "row", text: chart.time ? format.clock(xs[index]) : format.integer(xs[index]) });
      rows.push(element("tr", {}, head, ...texts.map((text) => element("td", { class: "number", text }))));
    }
    this.body.replaceChildren(...rows);
  }
}

function lastKnown(column) {
  for (let index = column.length - 1; index >= 0; index -= 1) if (column[index] !== null) return column[index];
  return null;
}
