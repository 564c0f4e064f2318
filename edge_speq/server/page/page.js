// The page of edge-speq serve: a chat, and what happens to the experts meanwhile. No dependencies, no build.
const byId = (id) => document.getElementById(id);
const KEY = "edge-speq-key";
const PAUSES = { ready: 250, loading: 500, lost: 2000 }; // milliseconds between two looks at the residency

const messages = [];
let reply = null; // the AbortController of the reply that is written
let asking = null; // the promise of the key that is asked for
let last = null; // the snapshot before

function headers() {
  const key = sessionStorage.getItem(KEY);
  return key ? { authorization: `Bearer ${key}` } : {};
}

function askForKey() {
  asking ??= new Promise((resolve) => {
    const dialog = byId("key-dialog");
    dialog.addEventListener("close", () => {
      if (byId("key").value) sessionStorage.setItem(KEY, byId("key").value.trim());
      byId("key").value = "";
      asking = null;
      resolve();
    }, { once: true });
    dialog.showModal();
  });
  return asking;
}

// A response that is not a refused key: that one is asked for until it fits.
async function ask(path, options = {}) {
  for (;;) {
    const response = await fetch(path, { ...options, headers: { ...options.headers, ...headers() } });
    if (response.status !== 401) return response;
    await askForKey();
  }
}

async function problem(response) {
  const body = await response.json().catch(() => null);
  return body?.error?.message ?? `${response.status} ${response.statusText}`;
}

// --- chat ---------------------------------------------------------------------------------------------

function show(role, text, kind = "") {
  const article = document.createElement("article");
  const who = document.createElement("b");
  who.textContent = role;
  const said = document.createElement("span");
  said.textContent = text;
  said.className = kind;
  article.append(who, said);
  byId("log").append(article);
  article.scrollIntoView({ block: "end" });
  return said;
}

async function* events(response) {
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const parts = (rest + value).split("\n\n");
    rest = parts.pop();
    for (const part of parts) {
      if (part.startsWith(":")) continue; // a ping
      const data = part.replace(/^data: /, "");
      if (data === "[DONE]") return;
      yield JSON.parse(data);
    }
  }
}

async function say(text) {
  messages.push({ role: "user", content: text });
  show("You", text);
  const said = show("Model", "");
  reply = new AbortController();
  busy(true);
  try {
    const response = await ask("v1/chat/completions", {
      method: "POST",
      signal: reply.signal,
      headers: { "content-type": "application/json" },
      body: JSON.stringify({
        messages,
        stream: true,
        temperature: Number(byId("temperature").value),
        max_tokens: Number(byId("tokens").value),
      }),
    });
    if (!response.ok) throw new Error(await problem(response));
    for await (const event of events(response)) {
      if (event.error) throw new Error(event.error.message);
      said.textContent += event.choices[0]?.delta?.content ?? "";
      said.parentElement.scrollIntoView({ block: "end" });
    }
  } catch (error) {
    if (error.name !== "AbortError") show("Error", error.message, "error");
  }
  if (said.textContent) messages.push({ role: "assistant", content: said.textContent });
  else { messages.pop(); said.parentElement.remove(); }
  reply = null;
  busy(false);
}

function busy(is) {
  byId("send").disabled = is;
  byId("stop").disabled = !is;
  byId("log").setAttribute("aria-busy", String(is));
  if (!is) byId("message").focus();
}

byId("say").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = byId("message").value.trim();
  if (!text || reply) return;
  byId("message").value = "";
  say(text);
});
byId("message").addEventListener("keydown", (event) => {
  if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
    event.preventDefault();
    byId("say").requestSubmit();
  }
});
byId("stop").addEventListener("click", () => reply?.abort());
document.addEventListener("keydown", (event) => { if (event.key === "Escape") reply?.abort(); });
byId("clear").addEventListener("click", () => {
  reply?.abort();
  messages.length = 0;
  byId("log").replaceChildren();
  byId("message").focus();
});

// --- experts ------------------------------------------------------------------------------------------

const size = (bytes) => bytes >= 2 ** 30 ? `${(bytes / 2 ** 30).toFixed(2)} GiB` : `${(bytes / 2 ** 20).toFixed(1)} MiB`;
const percent = (part, whole) => whole ? `${(100 * part / whole).toFixed(1)} %` : "–";

function figures(now) {
  const e = now.experts, s = now.speculation;
  const seconds = last ? now.seconds - last.seconds : 0;
  const since = (get) => last ? get(now) - get(last) : 0;
  const steps = since((x) => x.steps), drafted = since((x) => x.speculation.drafted);
  const rate = seconds ? since((x) => x.experts.bytes_fetched) / seconds : 0;
  const demands = since((x) => x.experts.hits + x.experts.misses);
  const link = now.link_bytes_per_s ? `${percent(rate, now.link_bytes_per_s)} of ${size(now.link_bytes_per_s)}/s` : `${size(e.bytes_fetched)} in all`;
  const rows = [["Speed", `${now.tok_per_s.toFixed(1)} tok/s`, `${now.n_generated} tokens`]];
  if (e.hits !== null && now.residency) rows.push(
    ["Hits", percent(e.hits, e.hits + e.misses), demands ? `now ${percent(since((x) => x.experts.hits), demands)}` : `${e.misses} misses`],
    ["Link", `${size(rate)}/s`, link],
    ["Stalled", `${(e.stall_ms / 1000).toFixed(2)} s`, seconds ? `now ${(since((x) => x.experts.stall_ms) / seconds / 10).toFixed(1)} %` : ""],
    ["Slots", `${e.slots}`, `of ${e.total} experts`],
  );
  if (now.has_draft) rows.push(
    ["K", steps ? (drafted / steps).toFixed(1) : s.mean_draft_tokens.toFixed(1), `mean ${s.mean_draft_tokens.toFixed(1)}`],
    ["Acceptance", percent(s.accepted, s.drafted), drafted ? `now ${percent(since((x) => x.speculation.accepted), drafted)}` : `${s.drafted} drafted`],
  );
  rows.push(["Memory", size(now.memory.used_bytes), now.memory.budget_bytes ? `of ${size(now.memory.budget_bytes)}` : "no budget"]);
  byId("figures").replaceChildren(...rows.map(([name, value, more]) => {
    const box = document.createElement("div"), dt = document.createElement("dt"), dd = document.createElement("dd"), small = document.createElement("small");
    dt.textContent = name;
    dd.textContent = `${value} `;
    small.textContent = more;
    dd.append(small);
    box.append(dt, dd);
    return box;
  }));
}

function map(now) {
  const rows = now.residency;
  byId("map").hidden = !rows;
  if (!rows) {
    byId("map-text").textContent = "There are no slots under this policy, so there is nothing to show.";
    return;
  }
  const canvas = byId("map"), n = rows[0].length, cell = Math.max(1, Math.floor(1024 / n)), gap = cell > 4 ? 1 : 0;
  const tall = Math.max(cell, Math.min(32, Math.floor(480 / rows.length)));
  canvas.width = n * cell;
  canvas.height = rows.length * tall;
  const context = canvas.getContext("2d");
  const colours = [...document.querySelectorAll(".legend i")].map((i) => getComputedStyle(i).backgroundColor);
  rows.forEach((row, y) => {
    for (let x = 0; x < n; x++) {
      context.fillStyle = colours[row[x]];
      context.fillRect(x * cell, y * tall, cell - gap, tall - gap);
    }
  });
  const held = rows.map((row) => row.replace(/[01]/g, "").length);
  byId("map-text").textContent = `${held.reduce((a, b) => a + b, 0)} of ${rows.length * n} experts are resident: ` +
    `${rows.length} layers from top to bottom, ${n} experts from left to right; ${Math.min(...held)} to ${Math.max(...held)} a layer.`;
}

function state(text) {
  if (byId("state").textContent !== text) byId("state").textContent = text;
}

async function look() {
  try {
    const response = await ask("residency");
    if (!response.ok) {
      state(await problem(response));
      return PAUSES.loading;
    }
    const now = await response.json();
    byId("model").textContent = `${now.model} on ${now.backend.device}`;
    const { served, waiting } = now.requests;
    state(served ? `writing${waiting ? `, ${waiting} waiting` : ""}` : "ready");
    byId("plan").textContent = now.memory.plan.reason;
    figures(now);
    map(now);
    last = now;
    return PAUSES.ready;
  } catch {
    state("the server does not answer");
    return PAUSES.lost;
  }
}

async function watch() {
  for (;;) {
    const pause = document.hidden ? PAUSES.lost : await look();
    await new Promise((resolve) => setTimeout(resolve, pause));
  }
}

byId("message").focus();
watch();
