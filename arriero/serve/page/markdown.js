// Markdown to DOM nodes, for text that nobody vouches for: every piece of it ends in a text node. No HTML is parsed,
// no attribute is taken from the text but the address of a link, and that only with http, https or mailto.

const FENCE = /^ {0,3}(`{3,}|~{3,})\s*([^`\s]*)[^`]*$/;
const HEADING = /^ {0,3}(#{1,6})\s+(.*?)\s*#*$/;
const RULE = /^ {0,3}([-*_])(?:\s*\1){2,}\s*$/;
const ITEM = /^(\s*)([-*+]|\d{1,9}[.)])\s+(.*)$/;
const QUOTE = /^ {0,3}> ?(.*)$/;
const CELLS = /^\s*\|?[\s:|-]*-[\s:|-]*\|[\s:|-]*$/;
const ESCAPABLE = "\\`*_{}[]()#+.!|~-";
const DEEPEST = 8;

function element(name, ...children) {
  const node = document.createElement(name);
  node.append(...children);
  return node;
}

// Put the nodes of `text` in the place of what `container` holds.
export function show(text, container) {
  container.replaceChildren(...blocks(text.replace(/\r\n?/g, "\n").split("\n"), 0));
}

function blocks(lines, depth) {
  const nodes = [];
  let at = 0, paragraph = [], level = 2;
  const flush = () => {
    if (paragraph.length) nodes.push(element("p", ...inline(paragraph.join("\n"), 0)));
    paragraph = [];
  };
  while (at < lines.length) {
    const line = lines[at];
    let match;
    if ((match = FENCE.exec(line))) {
      flush();
      const body = [], close = new RegExp("^ {0,3}" + (match[1][0] === "`" ? "`" : "~") + "{" + match[1].length + ",}\\s*$");
      for (at++; at < lines.length && !close.test(lines[at]); at++) body.push(lines[at]);
      at++;
      const pre = element("pre", element("code", body.join("\n")));
      pre.tabIndex = 0;
      nodes.push(pre);
    } else if (!line.trim()) {
      flush();
      at++;
    } else if ((match = HEADING.exec(line))) {
      flush();
      level = Math.min(6, match[1].length + 2, level + 1); // below the page's own, and none left out
      nodes.push(element("h" + level, ...inline(match[2], 0)));
      at++;
    } else if (RULE.test(line)) {
      flush();
      nodes.push(element("hr"));
      at++;
    } else if (depth < DEEPEST && QUOTE.test(line)) {
      flush();
      const inner = [];
      for (; at < lines.length && (match = QUOTE.exec(lines[at])); at++) inner.push(match[1]);
      nodes.push(element("blockquote", ...blocks(inner, depth + 1)));
    } else if (depth < DEEPEST && ITEM.test(line)) {
      flush();
      at = list(lines, at, nodes, depth);
    } else if (line.includes("|") && at + 1 < lines.length && CELLS.test(lines[at + 1])) {
      flush();
      at = table(lines, at, nodes);
    } else {
      paragraph.push(line);
      at++;
    }
  }
  flush();
  return nodes;
}

function list(lines, at, nodes, depth) {
  const first = ITEM.exec(lines[at]), ordered = /\d/.test(first[2]);
  const made = element(ordered ? "ol" : "ul");
  if (ordered) made.start = parseInt(first[2], 10);
  const indent = first[1].length;
  while (at < lines.length) {
    const match = ITEM.exec(lines[at]);
    if (!match || match[1].length !== indent || /\d/.test(match[2]) !== ordered) break;
    const inner = [match[3]];
    for (at++; at < lines.length; at++) {
      const next = ITEM.exec(lines[at]);
      const deeper = /^\s/.test(lines[at]) && lines[at].search(/\S/) > indent;
      if (next ? next[1].length <= indent : !(deeper || (lines[at].trim() && inner.at(-1).trim() && !HEADING.test(lines[at]) && !FENCE.test(lines[at])))) break;
      inner.push(lines[at].slice(Math.min(lines[at].search(/\S|$/), indent + 2)));
    }
    while (at < lines.length && !lines[at].trim() && at + 1 < lines.length && ITEM.test(lines[at + 1])) at++;
    const children = blocks(inner, depth + 1);
    if (children.length && children[0].tagName === "P") children.splice(0, 1, ...children[0].childNodes);
    made.append(element("li", ...children));
  }
  nodes.push(made);
  return at;
}

function table(lines, at, nodes) {
  const cells = (line) => line.trim().replace(/^\||\|$/g, "").split("|").map((cell) => cell.trim());
  const head = cells(lines[at]), body = [];
  for (at += 2; at < lines.length && lines[at].includes("|"); at++) body.push(cells(lines[at]));
  const row = (kind, texts) => element("tr", ...head.map((_, i) => element(kind, ...inline(texts[i] ?? "", 0))));
  nodes.push(element("table", element("thead", row("th", head)), element("tbody", ...body.map((each) => row("td", each)))));
  return at;
}

// Code, emphasis and links. Each sign looks for its end by `indexOf`, a bounded number of times; a sign without an end is
// text, and is not looked for again. So time is linear in the text, whatever it holds.
function inline(text, depth) {
  const nodes = [], endless = new Set();
  let begun = 0, at = 0;
  const put = (node, end) => {
    if (at > begun) nodes.push(text.slice(begun, at));
    nodes.push(node);
    begun = at = end;
  };
  while (at < text.length) {
    const c = text[at];
    if (c === "\\" && at + 1 < text.length && ESCAPABLE.includes(text[at + 1])) put(text[at + 1], at + 2);
    else if (c === "`" || c === "*" || c === "_") {
      const n = run(text, at), sign = c.repeat(n), from = at + n;
      const end = depth < DEEPEST && (c === "`" || n <= 3) && !endless.has(sign) && opens(text, at, n) ? closing(text, sign, from, endless) : -1;
      if (end < 0) at = from;
      else {
        const inner = text.slice(from, end);
        if (c === "`") put(element("code", inner.replace(/^ (.*) $/s, "$1")), end + n);
        else {
          const children = inline(inner, depth + 1);
          put(n === 1 ? element("em", ...children) : n === 2 ? element("strong", ...children) : element("strong", element("em", ...children)), end + n);
        }
      }
    } else if (c === "[") {
      const middle = text.slice(at, at + 500).indexOf("]("), end = middle < 0 ? -1 : text.slice(at, at + 2500).indexOf(")", middle);
      const node = end < 0 ? null : link(text.slice(at + 1, at + middle), text.slice(at + middle + 2, at + end));
      if (node) put(node, at + end + 1);
      else at++;
    } else at++;
  }
  if (at > begun) nodes.push(text.slice(begun));
  return nodes;
}

// How often the sign at `at` stands there.
function run(text, at) {
  let end = at + 1;
  while (text[end] === text[at]) end++;
  return end - at;
}

function opens(text, at, n) {
  if (text[at] === "`") return true;
  return /\S/.test(text[at + n] ?? " ") && (text[at] === "*" || !/\w/.test(text[at - 1] ?? " "));
}

function closing(text, sign, from, endless) {
  for (let tries = 0, at = from; tries < 50; tries++) {
    at = text.indexOf(sign, at);
    if (at < 0) {
      endless.add(sign);
      return -1;
    }
    const n = run(text, at), behind = text[at + n] ?? " ";
    if (n === sign.length && at > from && (sign[0] === "`" || (/\S/.test(text[at - 1]) && (sign[0] === "*" || !/\w/.test(behind))))) return at;
    at += n;
  }
  return -1;
}

function link(label, address) {
  if (/[[\]\n]/.test(label) || !/^(https?:\/\/|mailto:)[^\s()<>]+$/i.test(address)) return null;
  const made = element("a", label);
  made.href = address;
  made.rel = "noopener noreferrer nofollow";
  made.target = "_blank";
  return made;
}
