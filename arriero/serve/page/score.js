// A text, or a conversation with its training mask, coloured by each token's log-probability under each model.

// White for certain to red for a surprise: ln p of 0 to -8.
function shade(logprob) {
  const surprise = Math.min(1, Math.max(0, -logprob / 8));
  return `hsl(8 90% ${Math.round(100 - 38 * surprise)}%)`;
}

function percent(logprob) {
  const p = 100 * Math.exp(logprob);
  return p >= 0.1 ? `${p.toFixed(1)}%` : `${p.toExponential(1)}%`;
}

export async function colour(asked, models, post, container) {
  const columns = await Promise.all(models.map((model) => column(asked, model, post)));
  container.replaceChildren(...columns);
}

async function column(asked, model, post) {
  const box = document.createElement("article");
  box.className = "column";
  let prompt = asked.text, trained = [];
  if (asked.messages) {
    const rendered = await (await post("render", { model, messages: asked.messages(model) })).json();
    prompt = rendered.tokens;
    trained = rendered.trained;
  }
  const body = { model, prompt, max_tokens: 0, echo: true, logprobs: 5 };
  const found = (await (await post("v1/completions", body)).json()).choices[0].logprobs;
  const scored = found.token_logprobs.filter((logprob) => logprob !== null);
  const mean = scored.reduce((sum, logprob) => sum + logprob, 0) / Math.max(1, scored.length);
  const head = document.createElement("h2");
  head.textContent = `${model}: ${found.tokens.length} tokens, perplexity ${Math.exp(-mean).toFixed(2)}`;
  const text = document.createElement("div");
  text.className = "tokens";
  text.append(...found.tokens.map((token, i) => span(token, found.token_logprobs[i], found.top_logprobs[i], trained[i])));
  if (text.firstChild) text.firstChild.tabIndex = 0; // the others by the arrow keys
  text.addEventListener("keydown", (event) => {
    const next = { ArrowRight: "nextSibling", ArrowLeft: "previousSibling" }[event.key];
    if (next) document.activeElement[next]?.focus();
  });
  box.append(head, text);
  return box;
}

function span(token, logprob, top, trained) {
  const node = document.createElement("span");
  node.className = trained === undefined ? "token" : trained ? "token trained" : "token masked";
  node.textContent = token;
  node.tabIndex = -1;
  if (logprob === null) return node;
  node.style.backgroundColor = shade(logprob);
  const others = Object.entries(top ?? {}).sort((a, b) => b[1] - a[1]).map(([other, p]) => `${JSON.stringify(other)} ${percent(p)}`);
  node.title = `${percent(logprob)} (ln p ${logprob.toFixed(2)})\n${others.join("\n")}`;
  return node;
}
