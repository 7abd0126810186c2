// The sample browser. Text of models and files only ever becomes text nodes: the grid is given numbers and nodes.
const RUN = 0, TASK = 1, LENGTH = 2, METHOD = 3, SAMPLE = 4, PROMPT = 5, REFERENCES = 6, SCORE = 7, PLACE = 8,
  TOKEN = 9, THEIRS = 10, TOKENS = 11, PREDICTION = 12, GAIN = 13;
const holder = document.getElementById("data");
if (holder) browse(JSON.parse(holder.textContent));

function browse(data) {
  holder.remove();
  const verdicts = {
    right: row => row[SCORE] === 1,
    "partly right": row => row[SCORE] !== null && row[SCORE] > 0 && row[SCORE] < 1,
    wrong: row => row[SCORE] === 0,
    unscored: row => row[SCORE] === null,
    "changed: other tokens than full attention": row => row[PLACE] !== null && row[PLACE] > 0,
    "changed: worse than full attention": row => row[GAIN] !== null && row[GAIN] < 0,
    "changed: better than full attention": row => row[GAIN] !== null && row[GAIN] > 0,
  };
  const form = document.getElementById("filters");
  const field = name => form.elements.namedItem(name); // `elements.length` is a number
  const lengths = [...new Set(data.rows.map(row => row[LENGTH]))].sort((a, b) => a - b);
  choices(field("run"), data.runs.map((name, place) => [name, place]));
  choices(field("task"), data.tasks.map((name, place) => [name, place]));
  choices(field("length"), lengths.map(length => [length.toLocaleString("en"), length]));
  choices(field("method"), data.methods.map((name, place) => [name, place]));
  choices(field("verdict"), Object.keys(verdicts).map(name => [name, name]));

  const column = (title, shown, order, className = "") => ({
    title, className, type: "num", searchable: false,
    render: (_, kind, row) => (kind === "display" ? shown(row) : order(row)),
  });
  const several = data.runs.length > 1;
  const columns = [
    ...(several ? [column("run", row => text(data.runs[row[RUN]]), row => row[RUN])] : []),
    column("task", row => text(data.tasks[row[TASK]]), row => row[TASK]),
    column("length", row => text(row[LENGTH].toLocaleString("en")), row => row[LENGTH], "number"),
    column("sample", row => opener(data.samples[row[SAMPLE]]), row => row[SAMPLE]),
    column("method", row => text(data.methods[row[METHOD]]), row => row[METHOD]),
    column("score", scored, row => row[SCORE] ?? -1, "number"),
    column("leaves full at token", row => text(leaves(row)), row => row[PLACE] || Infinity, "number"),
    column("answer", row => text(brief(row[PREDICTION])), row => row[PREDICTION].length),
  ];
  const table = new DataTable("#samples", {
    data: data.rows, columns, pageLength: 25, order: [], autoWidth: false, typeDetect: false, orderMulti: false,
    layout: { topStart: null, topEnd: null, bottomStart: "info", bottomEnd: "paging" },
    language: { emptyTable: "no answers", zeroRecords: "no such answers", info: "_START_–_END_ of _TOTAL_ answers",
      infoEmpty: "", infoFiltered: "(of _MAX_)" },
  });
  table.search.fixed("chosen", (_, row) => keeps(row));

  let wanted = read();
  function read() {
    const value = name => field(name).value;
    const place = name => (value(name) === "" ? null : Number(value(name)));
    return { run: place("run"), task: place("task"), length: place("length"), method: place("method"),
      verdict: verdicts[value("verdict")] ?? null, text: value("text").toLowerCase() };
  }
  function keeps(row) {
    if (wanted.run !== null && row[RUN] !== wanted.run) return false;
    if (wanted.task !== null && row[TASK] !== wanted.task) return false;
    if (wanted.length !== null && row[LENGTH] !== wanted.length) return false;
    if (wanted.method !== null && row[METHOD] !== wanted.method) return false;
    if (wanted.verdict !== null && !wanted.verdict(row)) return false;
    return wanted.text === "" || row[PREDICTION].toLowerCase().includes(wanted.text)
      || data.samples[row[SAMPLE]].toLowerCase().includes(wanted.text)
      || data.references[row[REFERENCES]].toLowerCase().includes(wanted.text);
  }
  const apply = () => { wanted = read(); table.draw(); };
  let waiting;
  form.addEventListener("change", apply);
  field("text").addEventListener("input", () => { clearTimeout(waiting); waiting = setTimeout(apply, 200); });
  form.addEventListener("reset", () => setTimeout(apply));
  form.addEventListener("submit", event => event.preventDefault());

  document.getElementById("samples").addEventListener("click", event => {
    const button = event.target.closest("button.open");
    if (!button) return;
    const row = table.row(button.closest("tr"));
    const shown = row.child.isShown();
    if (shown) row.child.hide();
    else row.child(answer(data, row.data()), "answer").show();
    button.setAttribute("aria-expanded", String(!shown));
  });
  document.documentElement.dataset.ready = "true";
}

function answer(data, row) {
  const held = element("div");
  const full = data.rows.find(other => other[PROMPT] === row[PROMPT] && other[RUN] === row[RUN]
    && other[TASK] === row[TASK] && other[LENGTH] === row[LENGTH] && other[SAMPLE] === row[SAMPLE]
    && data.methods[other[METHOD]] === "full");
  const pair = element("div", "pair");
  pair.append(block("answer", row[PREDICTION], full && full !== row ? full[PREDICTION] : null));
  if (full && full !== row) pair.append(block("full attention's answer", full[PREDICTION]));
  pair.append(block("references", data.references[row[REFERENCES]]));
  held.append(heading("first token that is not full attention's"), paragraph(difference(row)), pair,
    block("end of the prompt", data.prompts[row[PROMPT]] || "not recorded in this run"));
  return held;
}

function difference(row) {
  if (row[PLACE] === null) return "unknown: there is no answer of full attention to compare with, or none of this method";
  if (row[PLACE] === 0) return `none: all ${row[TOKENS]} tokens are full attention's`;
  const named = token => (token === null ? "the end" : `token id ${token}`);
  return `token ${row[PLACE]} of ${row[TOKENS]}: ${named(row[TOKEN])}, where full attention has ${named(row[THEIRS])}`;
}

function block(title, content, other = null) {
  const held = element("div"), shown = element("pre");
  let same = content.length;
  if (other !== null && other !== content) {
    same = 0;
    while (same < content.length && content[same] === other[same]) same += 1;
  }
  shown.append(text(content.slice(0, same)));
  if (same < content.length) shown.append(element("span", "left", content.slice(same)));
  held.append(heading(title), shown);
  return held;
}

function scored(row) {
  const score = row[SCORE];
  if (score === null) return element("span", "unscored", "unscored");
  return element("span", score === 1 ? "right" : score === 0 ? "wrong" : "", score.toFixed(2));
}

function leaves(row) {
  if (row[PLACE] === null) return "–";
  return row[PLACE] === 0 ? "never" : `${row[PLACE]} of ${row[TOKENS]}`;
}

function opener(name) {
  const button = element("button", "open", name);
  button.type = "button";
  button.setAttribute("aria-expanded", "false");
  return button;
}

function choices(select, pairs) {
  select.append(new Option("all", ""), ...pairs.map(([name, value]) => new Option(name, value)));
  if (pairs.length < 2) select.closest("label").hidden = true;
}

function brief(said) {
  const line = said.slice(0, 120).replace(/\s+/g, " ").trim();
  return line.length > 80 ? `${line.slice(0, 80)}…` : line;
}

function element(name, className = "", content = "") {
  const made = document.createElement(name);
  if (className) made.className = className;
  made.textContent = content;
  return made;
}

function text(content) { return document.createTextNode(content); }
function heading(content) { return element("h4", "", content); }
function paragraph(content) { return element("div", "", content); }
