// Takes the picture from the server, keeps it up to date by server-sent events, and shows it.
// Everything that came over the network goes into the page as text; see table.js.

import { Charts } from "./charts.js";
import { Table, element, write } from "./table.js";
import * as format from "./format.js";

const MAX_EPOCHS = 200;
const MAX_EVENTS = 200;
const SILENT_MS = 25000;

const state = { feed: "", parts: {}, miners: new Map(), epochs: new Map(), events: [] };
const byId = (id) => document.getElementById(id);
const charts = new Charts(byId("figures"));
const tables = makeTables();
const told = { at: 0, waiting: [] };
let stream = null;
let heardAt = 0;
let retry = null;

start();

async function start() {
  applyTheme(savedTheme());
  byId("theme").addEventListener("click", () => applyTheme(theme() === "dark" ? "light" : "dark", true));
  window.matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => applyTheme(savedTheme()));
  byId("miners-filter").addEventListener("input", showMiners);
  byId("miners-gone").addEventListener("change", showMiners);
  setInterval(checkSilence, 2000);
  await begin();
}

async function begin() {
  clearTimeout(retry);
  if (stream) stream.close();
  try {
    const answer = await fetch("/api/state");
    if (!answer.ok) throw new Error(`/api/state: ${answer.status}`);
    take(await answer.json());
    await charts.load();
  } catch {
    connection("lost", "The dashboard does not answer. Trying again.");
    retry = setTimeout(begin, 3000);
    return;
  }
  listen();
}

function take(whole) {
  state.feed = whole.feed;
  state.version = whole.version;
  state.parts = whole.parts;
  state.miners = new Map(whole.miners.map((row) => [row.key, row]));
  state.epochs = new Map(whole.lists.epochs.map((line) => [line.epoch, line]));
  state.events = whole.lists.events.map(numbered);
  show({ ...whole.parts, miners: true, epochs: true, events: true });
}

function listen() {
  stream = new EventSource(`/api/stream?since=${state.feed}-${state.version}`);
  stream.addEventListener("open", () => connection("live", "Live"));
  stream.addEventListener("update", (event) => {
    heardAt = performance.now();
    const began = performance.now();
    update(JSON.parse(event.data));
    performance.measure("update", { start: began });
    connection("live", "Live");
  });
  stream.addEventListener("reset", begin);
  stream.addEventListener("error", () => {
    connection("lost", "Connection lost. Trying again.");
    if (stream.readyState === EventSource.CLOSED) retry = setTimeout(begin, 3000);
    else stream.onopen = begin; // what changed meanwhile is asked for anew
  });
}

function update(change) {
  state.version = change.version;
  Object.assign(state.parts, change.parts);
  for (const row of change.miners) state.miners.set(row.key, row);
  for (const key of change.gone) state.miners.delete(key);
  for (const line of change.lists.epochs || []) state.epochs.set(line.epoch, line);
  const events = (change.lists.events || []).map(numbered);
  state.events = [...events.reverse(), ...state.events].slice(0, MAX_EVENTS);
  if (state.epochs.size > 2 * MAX_EPOCHS) trimEpochs();
  show({
    ...change.parts,
    miners: change.miners.length || change.gone.length,
    epochs: change.lists.epochs,
    events: events.length,
  });
  charts.add(change.lists);
  announce(events);
}

function show(changed) {
  if (changed.run || changed.chain || changed.swarm || changed.epochs) showOverview();
  if (changed.miners) showMiners();
  if (changed.epochs) {
    const ended = [...state.epochs.values()].filter((line) => line.outcome);
    tables.exchanges.set(ended.sort((a, b) => b.epoch - a.epoch));
  }
  if (changed.validators) tables.validators.set(state.parts.validators || []);
  if (changed.matrix) showMatrix(state.parts.matrix);
  if (changed.events) tables.events.set(state.events);
}

function trimEpochs() {
  const kept = [...state.epochs.keys()].sort((a, b) => b - a).slice(0, MAX_EPOCHS);
  state.epochs = new Map(kept.map((epoch) => [epoch, state.epochs.get(epoch)]));
}

// Overview

function showOverview() {
  const { run = {}, swarm = {}, chain = null } = state.parts;
  write(byId("run-id"), run.run_id || "");
  document.title = `${run.run_id || "hivetrain"}: epoch ${format.integer(swarm.epoch)}`;
  const trained = latestWith("loss");
  const heldout = latestWith("heldout_loss");
  const left = chain && chain.block !== null ? chain.next_epoch - chain.block : null;
  const wait = left === null ? "" : `epoch in ${left} blocks, about ${format.duration(left * chain.block_time_s)}`;
  card("epoch", "Swarm epoch", swarm.epoch, format.integer, `${format.integer(swarm.in_step)} of ${format.integer(swarm.peers)} in step`);
  card("peers", "Peers", swarm.peers, format.integer, swarm.strangers ? `${swarm.strangers} with other settings` : "");
  card("loss", "Training loss", trained.loss ?? swarm.loss, format.loss,
    trained.epoch < 0 ? "of the last microbatches" : `of epoch ${trained.epoch}, ${trained.reporters} peers`);
  card("heldout", "Held-out loss", heldout.heldout_loss, format.loss, heldout.epoch < 0 ? "not measured" : `at epoch ${heldout.epoch}`);
  card("tokens-per-s", "Tokens per second", swarm.tokens_per_s, format.large, `${format.integer(swarm.reporting)} peers tell`);
  card("batch", "Batch", swarm.samples, format.integer, swarm.target ? `of ${format.integer(swarm.target)} samples` : "target unknown");
  card("tokens", "Tokens trained on", swarm.tokens, format.large, "by those who are here");
  card("pass", "Data pass", swarm.data_pass, format.integer,
    swarm.n_windows ? `window ${format.integer(swarm.window + 1)} of ${format.integer(swarm.n_windows)}` : "");
  card("model", "Trainable params", swarm.num_params, format.large, [swarm.optimizer, swarm.compression].filter(Boolean).join(", "));
  card("block", "Chain block", chain ? chain.block : null, format.integer, chain ? wait : "no chain given");
  card("tempo", "Tempo", chain ? chain.tempo : null, format.integer, chain ? "blocks" : "");
  card("neurons", "Registered", chain ? chain.neurons : null, format.integer, chain ? `${chain.validators} validators` : "");
  showAlerts(run, swarm, chain);
}

function latestWith(name) {
  let latest = { epoch: -1 };
  for (const line of state.epochs.values()) if (line[name] !== null && line.epoch > latest.epoch) latest = line;
  return latest;
}

function card(id, title, value, show, note) {
  let box = byId(`card-${id}`);
  if (!box) {
    box = element("div", { id: `card-${id}` }, element("dt", { text: title }), element("dd", { class: "value" }), element("dd", { class: "note" }));
    byId("cards").append(box);
  }
  write(box.children[1], show(value));
  box.children[1].dataset.value = JSON.stringify(value ?? null);
  write(box.children[2], note);
}

function showAlerts(run, swarm, chain) {
  const texts = [];
  if (run.error) texts.push(`Since ${format.clock(run.error_since)}: ${run.error}`);
  if (run.left_out) texts.push(`Live peers that are not shown for want of room: ${run.left_out}.`);
  if (chain && chain.error) texts.push(`The chain does not answer: ${chain.error}`);
  if (swarm.diverged) texts.push(`${swarm.diverged} peers report a loss that is not a number.`);
  const host = byId("alerts");
  if ([...host.children].map((child) => child.textContent).join("\n") === texts.join("\n")) return;
  host.replaceChildren(...texts.map((text) => element("p", { text })));
}

// Tables

function showMiners() {
  const wanted = byId("miners-filter").value.trim().toLowerCase();
  const withGone = byId("miners-gone").checked;
  const matches = (row) => !wanted || [row.peer_id, row.hotkey, row.presence, row.device, row.why, String(row.uid)]
    .some((text) => text && text.toLowerCase().includes(wanted));
  tables.miners.set([...state.miners.values()].filter((row) => (withGone || row.presence === "live") && matches(row)));
}

function showMatrix(matrix) {
  const columns = [
    { title: "miner", value: (row) => row.miner, show: format.short, full: true },
    ...matrix.validators.map((validator, index) => ({
      title: format.short(validator), kind: "number", value: (row) => row.shares[index], show: format.percent, paint: heat,
    })),
  ];
  const shape = matrix.validators.join();
  if (!tables.matrix || tables.matrix.shape !== shape) {
    const caption = "Weight matrix: each miner's share by validator";
    tables.matrix = new Table(byId("matrix-table"), caption, columns, { key: (row) => row.miner });
    tables.matrix.shape = shape;
  }
  tables.matrix.set(matrix.miners.map((miner, index) => ({ miner, shares: matrix.shares[index] })));
}

function heat(cell, share) {
  cell.style.backgroundColor = share ? `rgba(var(--heat), ${Math.min(0.35, 0.05 + share / 2)})` : "";
}

function makeTables() {
  const figure = (title, name, show) => ({ title, kind: "number", value: (row) => row[name], show });
  const name = (title, field) => ({ title, value: (row) => row[field], show: format.short, full: true });
  const words = (title, field) => ({ title, value: (row) => row[field], show: format.text });
  const verdicts = (value) => (value ? Object.entries(value).map(([verdict, count]) => `${count} ${verdict}`).join(", ") : null);
  return {
    exchanges: new Table(byId("exchanges-table"), "Exchanges, the latest first", [
      figure("epoch", "epoch", format.integer), words("outcome", "outcome"),
      { title: "group", kind: "number", value: (row) => row.group_size, show: (value, row) => `${value} of ${row.expected_peers}` },
      figure("received", "fraction", format.percent), figure("matchmaking", "matchmaking_s", format.seconds),
      figure("exchange", "exchange_s", format.seconds), figure("sent", "bytes_sent", format.bytes),
      figure("taken in", "bytes_received", format.bytes), figure("samples", "batch_samples", format.integer),
      figure("loss", "loss", format.loss), figure("failed attempts", "failed", format.integer),
      { title: "why", kind: "wide", value: (row) => row.reason, show: format.text },
    ], { key: (row) => row.epoch, isBad: (row) => row.outcome && !["averaged", "alone", "local"].includes(row.outcome) }),
    miners: new Table(byId("miners-table"), "Miners", [
      name("peer", "peer_id"), words("state", "presence"),
      { title: "hotkey", value: (row) => row.hotkey, full: true,
        show: (value, row) => (value && !row.hotkey_proven ? `${format.short(value)} (claimed)` : format.short(value)) },
      figure("uid", "uid", format.integer), figure("epoch", "epoch", format.integer), figure("loss", "loss", format.loss),
      figure("tokens/s", "tokens_per_s", format.large), figure("samples", "samples", format.integer),
      figure("verified", "verified", format.integer),
      { title: "audits", value: (row) => verdicts(row.verdicts), show: format.text },
      figure("weight", "weight", format.percent), figure("incentive", "incentive", format.percent),
      { title: "last seen", value: (row) => row.last_seen, show: (value, row) => (row.presence === "live" ? "now" : format.clock(value)) },
      words("device", "device"), figure("energy", "energy_j", format.joules),
      { title: "why", kind: "wide", value: (row) => row.why, show: format.text },
    ], { key: (row) => row.key, isBad: (row) => row.presence === "lost" || row.stranger, sort: { index: 0, falling: false } }),
    validators: new Table(byId("validators-table"), "Validators", [
      name("hotkey", "hotkey"), figure("uid", "uid", format.integer), figure("stake", "stake", format.large),
      figure("dividends", "dividends", format.percent), figure("weights set, blocks ago", "updated_blocks_ago", format.integer),
      figure("miners weighted", "miners_weighted", format.integer), figure("scores of block", "board_block", format.integer),
      { title: "state", value: (row) => row.active, show: (value) => (value ? "active" : "silent") },
    ], { key: (row) => row.hotkey, isBad: (row) => !row.active }),
    events: new Table(byId("events-table"), "Joins and losses, the latest first", [
      { title: "time", value: (row) => row.at, show: format.clock }, words("event", "kind"), name("peer", "peer_id"),
      { title: "what happened", kind: "wide", value: (row) => row.text, show: format.text },
    ], { key: (row) => row.number, isBad: (row) => row.kind === "lost" }),
    matrix: null,
  };
}

let events = 0;
function numbered(event) {
  events += 1;
  return { ...event, number: events };
}

// What is said aloud: changes of the peers, gathered, so that a flood is one sentence.

function announce(news) {
  told.waiting.push(...news);
  if (!told.waiting.length || told.timer) return;
  told.timer = setTimeout(() => {
    const first = told.waiting.slice(0, 3).map((event) => `Peer ${format.short(event.peer_id)} ${event.text}.`);
    const others = told.waiting.length - first.length;
    write(byId("announcer"), first.join(" ") + (others > 0 ? ` And ${others} more.` : ""));
    told.waiting = [];
    told.timer = null;
  }, 1000);
}

function connection(kind, text) {
  const host = byId("connection");
  host.dataset.state = kind;
  write(host, text);
}

function checkSilence() {
  if (stream && stream.readyState === EventSource.OPEN && heardAt && performance.now() - heardAt > SILENT_MS) {
    connection("live", "Live, nothing new");
  }
}

// Theme: the system's, unless chosen here.

function savedTheme() {
  try {
    return localStorage.getItem("theme");
  } catch {
    return null;
  }
}

function theme() {
  return document.documentElement.dataset.theme;
}

function applyTheme(chosen, keep = false) {
  const system = window.matchMedia("(prefers-color-scheme: dark)").matches ? "dark" : "light";
  const wanted = chosen === "dark" || chosen === "light" ? chosen : system;
  const changed = theme() !== wanted;
  document.documentElement.dataset.theme = wanted;
  write(byId("theme"), wanted === "dark" ? "Light theme" : "Dark theme");
  if (keep) {
    try {
      localStorage.setItem("theme", wanted);
    } catch {
      // private mode: the choice lasts as long as the page
    }
  }
  if (changed) charts.restyle();
}
