// The page: conversations with one to three models side by side, kept in this browser alone, and texts coloured by
// log-probability. It speaks OpenAI's API of the server that it came from, and puts text into text nodes only.

import { show } from "./markdown.js";
import { preferenceRows, sftRows } from "./rows.js";
import { colour } from "./score.js";

const $ = (id) => document.getElementById(id);
const STORE = "arriero";
const MOST = 3; // models side by side
const SETTINGS = ["system", "temperature", "top_p", "max_tokens", "seed"];

const state = Object.assign({ conversations: [], open: null, models: [], theme: null }, stored());
let served = [], running = null;

function stored() {
  try {
    return JSON.parse(localStorage.getItem(STORE)) ?? {};
  } catch {
    return {};
  }
}

function keep() {
  try {
    localStorage.setItem(STORE, JSON.stringify(state));
  } catch {
    say("This browser keeps no more conversations; delete old ones.");
  }
}

const say = (text) => { $("status").textContent = text; };

function make(name, text, attributes = {}) {
  const node = document.createElement(name);
  if (text) node.textContent = text;
  for (const [key, value] of Object.entries(attributes)) node.setAttribute(key, value);
  return node;
}

function button(text, label, act, pressed) {
  const node = make("button", text, { type: "button", "aria-label": label, title: label });
  if (pressed !== undefined) node.setAttribute("aria-pressed", String(pressed));
  node.addEventListener("click", act);
  return node;
}

// Conversations

const current = () => state.conversations.find((each) => each.id === state.open);

function begin() {
  if (running) return;
  const settings = Object.fromEntries(SETTINGS.map((name) => [name, current()?.settings[name] ?? $(name).value]));
  const conversation = { id: crypto.randomUUID?.() ?? String(Date.now() + Math.random()), turns: [], settings };
  state.conversations.unshift(conversation);
  open(conversation.id);
}

function open(id) {
  if (running) return;
  state.open = id;
  for (const name of SETTINGS) $(name).value = current().settings[name] ?? "";
  keep();
  render();
}

function remove(id) {
  if (running) return;
  state.conversations = state.conversations.filter((each) => each.id !== id);
  if (state.open === id) state.open = state.conversations[0]?.id ?? null;
  if (!state.open) begin();
  else open(state.open);
}

// What a model is asked: its own answers, or where another spoke alone, that one's.
function messages(conversation, turns, model) {
  const said = conversation.settings.system ? [{ role: "system", content: conversation.settings.system }] : [];
  for (const turn of turns) {
    said.push({ role: "user", content: turn.question });
    const answer = turn.answers.find((each) => each.model === model) ?? turn.answers[0];
    if (answer) said.push({ role: "assistant", content: answer.text });
  }
  return said;
}

// Asking

async function ask(turn) {
  const conversation = current(), turns = conversation.turns.slice(0, conversation.turns.indexOf(turn));
  running = new AbortController();
  $("send").disabled = true;
  $("stop").disabled = false;
  say("Answering");
  await Promise.all(state.models.map(async (model) => {
    const answer = { model, text: "", tokens: 0, seconds: 0, rating: 0 };
    const before = turn.answers.findIndex((each) => each.model === model);
    if (before < 0) turn.answers.push(answer);
    else {
      const old = turn.answers[before];
      turn.earlier = [...(turn.earlier ?? []), old];
      turn.answers[before] = answer;
    }
    const asked = [...messages(conversation, turns, model), { role: "user", content: turn.question }];
    try {
      await stream(model, asked, conversation.settings, answer, running.signal);
    } catch (error) {
      if (error.name !== "AbortError") answer.error = String(error.message);
      else answer.stopped = true;
    }
  }));
  running = null;
  $("send").disabled = false;
  $("stop").disabled = true;
  const failed = turn.answers.filter((each) => each.error).length;
  say(failed ? `${failed} of the answers failed` : turn.answers.some((each) => each.stopped) ? "Stopped" : "Answered");
  keep();
  render();
}

async function stream(model, asked, settings, answer, signal) {
  const body = { model, messages: asked, stream: true, stream_options: { include_usage: true } };
  for (const name of SETTINGS.slice(1)) if (settings[name] !== "" && settings[name] != null) body[name] = Number(settings[name]);
  const response = await post("v1/chat/completions", body, signal);
  const began = performance.now(), decoder = new TextDecoder();
  let first = 0, rest = "", drawn = false;
  render();
  const reader = response.body.getReader();
  for (;;) {
    const { done, value } = await reader.read();
    if (done) break;
    const lines = (rest + decoder.decode(value, { stream: true })).split("\n\n");
    rest = lines.pop();
    for (const line of lines) {
      if (line === "data: [DONE]") continue;
      const chunk = JSON.parse(line.slice("data: ".length));
      if (chunk.error) throw new Error(chunk.error.message);
      if (chunk.usage) answer.tokens = chunk.usage.completion_tokens;
      const piece = chunk.choices[0]?.delta.content;
      if (piece) {
        first ||= performance.now();
        answer.text += piece;
      }
      if (chunk.choices[0]?.finish_reason === "length") answer.cut = true;
    }
    answer.first = ((first || performance.now()) - began) / 1000;
    answer.seconds = (performance.now() - (first || began)) / 1000;
    if (!drawn) {
      drawn = true;
      requestAnimationFrame(() => { drawn = false; drawAnswer(answer); });
    }
  }
}

export async function post(path, body, signal) {
  const response = await fetch(path, { method: "POST", headers: { "Content-Type": "application/json" }, body: JSON.stringify(body), signal });
  if (!response.ok) {
    const told = await response.json().catch(() => null);
    throw new Error(told?.error?.message ?? `the server answered with ${response.status}`);
  }
  return response;
}

// Drawing

const drawn = new WeakMap(); // the node of an answer's text

function render() {
  const list = $("conversations");
  list.replaceChildren(...state.conversations.map((each) => {
    const title = each.turns[0]?.question.slice(0, 60) || "New conversation", item = make("li");
    const go = button(title, `Open: ${title}`, () => open(each.id));
    if (each.id === state.open) go.setAttribute("aria-current", "true");
    item.append(go, button("×", `Delete: ${title}`, () => remove(each.id)));
    return item;
  }));
  const log = $("log"), atEnd = log.scrollHeight - log.scrollTop - log.clientHeight < 40;
  log.replaceChildren(...(current()?.turns ?? []).flatMap(drawTurn));
  if (atEnd) log.scrollTop = log.scrollHeight;
  const rows = [preferenceRows(state.conversations).length, sftRows(state.conversations).length];
  $("row-count").textContent = `${rows[0]} preferences, ${rows[1]} good answers`;
}

function drawTurn(turn) {
  const question = make("article", "", { class: "question", "aria-label": "You" });
  question.append(make("div", turn.question));
  const foot = make("div", "", { class: "foot" });
  foot.append(button("Edit", "Edit this message and ask again", () => editQuestion(turn, question)));
  question.append(foot);
  const answers = make("div", "", { class: "answers" });
  answers.append(...turn.answers.map((answer) => drawWhole(turn, answer)));
  return [question, answers];
}

function drawWhole(turn, answer) {
  const box = make("article", "", { class: "answer", "aria-label": `Answer of ${answer.model}` });
  const text = make("div", "", { class: "text" });
  drawn.set(answer, text);
  box.append(make("h2", answer.model), text);
  if (answer.error) box.append(make("p", answer.error, { class: "error" }));
  const foot = make("div", "", { class: "foot" });
  foot.append(button("Good", "Good answer", () => rate(answer, 1), answer.rating === 1));
  foot.append(button("Bad", "Bad answer", () => rate(answer, -1), answer.rating === -1));
  foot.append(button("Edit", "Edit this answer", () => editAnswer(turn, answer, box)));
  if (turn === current()?.turns.at(-1)) foot.append(button("Again", "Answer again", () => regenerate(turn)));
  foot.append(make("span", "", { class: "speed" }));
  box.append(foot);
  drawAnswer(answer);
  return box;
}

function drawAnswer(answer) {
  const text = drawn.get(answer);
  if (!text) return;
  show(answer.text, text);
  const speed = text.parentNode?.querySelector(".speed");
  if (!speed) return;
  const facts = answer.tokens ? [`${answer.tokens} tokens`] : [];
  if (answer.tokens > 1 && answer.seconds > 0) facts.push(`${((answer.tokens - 1) / answer.seconds).toFixed(1)} tokens/s`);
  if (answer.first && answer.tokens) facts.push(`first after ${answer.first.toFixed(2)} s`);
  if (answer.cut) facts.push("cut at the limit");
  if (answer.stopped) facts.push("stopped");
  speed.textContent = facts.join(", ");
}

function rate(answer, rating) {
  answer.rating = answer.rating === rating ? 0 : rating;
  keep();
  render();
}

function regenerate(turn) {
  if (!running) ask(turn);
}

function editor(box, label, text, done) {
  const field = make("textarea", "", { "aria-label": label, rows: String(Math.min(12, text.split("\n").length + 1)) });
  field.value = text;
  const foot = make("div", "", { class: "row" });
  foot.append(button("Keep", "Keep the change", () => done(field.value)), button("Leave", "Leave it as it was", render));
  box.replaceChildren(field, foot);
  field.focus();
}

function editQuestion(turn, box) {
  if (running) return;
  editor(box, "Your message", turn.question, (text) => {
    const turns = current().turns;
    turns.splice(turns.indexOf(turn));
    send(text);
  });
}

function editAnswer(turn, answer, box) {
  if (running) return;
  editor(box, "The answer", answer.text, (text) => {
    if (text !== answer.text) {
      turn.earlier = [...(turn.earlier ?? []), { ...answer, rating: -1 }];
      Object.assign(answer, { text, rating: 1, edited: true, tokens: 0 });
    }
    keep();
    render();
  });
}

function send(text) {
  if (running || !text.trim()) return;
  if (!state.models.length) return say("Choose a model first.");
  const turn = { question: text, answers: [] };
  current().turns.push(turn);
  $("message").value = "";
  ask(turn);
  $("log").scrollTop = $("log").scrollHeight;
}

// Rows, models, views

function download(rows, name) {
  if (!rows.length) return say("No answer is rated yet.");
  const link = make("a", "", { download: name });
  link.href = URL.createObjectURL(new Blob(rows.map((row) => JSON.stringify(row) + "\n"), { type: "application/jsonl" }));
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 1000);
}

function drawModels() {
  const box = $("models");
  for (const name of served) {
    const label = make("label"), check = make("input", "", { type: "checkbox" });
    check.checked = state.models.includes(name);
    check.addEventListener("change", () => {
      state.models = served.filter((each) => (each === name ? check.checked : state.models.includes(each)));
      if (state.models.length > MOST) {
        state.models = state.models.filter((each) => each !== name);
        check.checked = false;
        say(`${MOST} models at most stand side by side.`);
      }
      keep();
    });
    label.append(check, " ", name);
    box.append(label);
  }
}

function view(name) {
  for (const each of ["chat", "score"]) {
    $(each).hidden = each !== name;
    $(`view-${each}`).setAttribute("aria-pressed", String(each === name));
  }
}

async function score(body) {
  $("score-status").textContent = "Reading";
  try {
    await colour(body, state.models, post, $("scored"));
    $("score-status").textContent = "Hover over a token, or go to it by the arrow keys, for its probability and the likeliest others.";
  } catch (error) {
    $("score-status").textContent = error.message;
  }
}

async function start() {
  if (state.theme) document.documentElement.dataset.theme = state.theme;
  if (!current()) begin();
  else open(state.open);
  for (const name of SETTINGS) $(name).addEventListener("change", () => { current().settings[name] = $(name).value; keep(); });
  $("new").addEventListener("click", () => { begin(); $("message").focus(); });
  $("ask").addEventListener("submit", (event) => { event.preventDefault(); send($("message").value); });
  $("message").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) { event.preventDefault(); send($("message").value); }
  });
  document.addEventListener("keydown", (event) => { if (event.key === "Escape") running?.abort(); });
  $("stop").addEventListener("click", () => running?.abort());
  $("theme").addEventListener("click", () => {
    const dark = matchMedia("(prefers-color-scheme: dark)").matches;
    state.theme = (state.theme ?? (dark ? "dark" : "light")) === "dark" ? "light" : "dark";
    document.documentElement.dataset.theme = state.theme;
    keep();
  });
  $("save-preferences").addEventListener("click", () => download(preferenceRows(state.conversations), "preferences.jsonl"));
  $("save-sft").addEventListener("click", () => download(sftRows(state.conversations), "sft.jsonl"));
  $("view-chat").addEventListener("click", () => view("chat"));
  $("view-score").addEventListener("click", () => view("score"));
  $("measure").addEventListener("submit", (event) => { event.preventDefault(); if ($("text").value) score({ text: $("text").value }); });
  $("scored").addEventListener("focusin", (event) => { if (event.target.title) $("score-status").textContent = event.target.title; });
  $("take").addEventListener("click", () => score({ messages: (model) => messages(current(), current().turns, model) }));
  const response = await fetch("v1/models");
  served = response.ok ? (await response.json()).data.map((each) => each.id) : [];
  state.models = state.models.filter((name) => served.includes(name));
  if (!state.models.length) state.models = served.slice(0, 1);
  drawModels();
  keep();
  say(served.length ? "Ready" : "The server tells of no models.");
}

start();
