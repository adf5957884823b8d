// The page of the waits: a list, or, with a wait in the address, that wait. Nothing is built; this is what runs.

const API = new URL("../api/", document.baseURI);
const AIRFLOW = new URL("../../", document.baseURI);
const PAUSE = 5000; // milliseconds between two looks
const LIMIT = 50;
const main = document.getElementById("main");
const inAirflow = (() => {
  try {
    return window.parent !== window && Boolean(window.parent.document);
  } catch {
    return false;
  }
})();

// ---- what a page needs

/** Make an element: properties, then children; text is text, and null is left out. */
function h(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (value === null || value === undefined || value === false) continue;
    if (name.startsWith("on")) element.addEventListener(name.slice(2), value);
    else element.setAttribute(name, value === true ? "" : value);
  }
  element.append(...children.flat().filter((child) => child !== null && child !== undefined && child !== false));
  return element;
}

/** Keep an integer of an event that has more digits than a number here can hold, where the browser knows how. */
function exactly(name, value, context) {
  const isRounded = typeof value === "number" && Number.isInteger(value) && !Number.isSafeInteger(value);
  return isRounded && context?.source && JSON.rawJSON ? JSON.rawJSON(context.source) : value;
}

/** Call Airflow with the login of this browser; fail with what it answered. */
async function call(address, options = {}) {
  const answer = await fetch(address, { credentials: "same-origin", ...options });
  if (answer.ok) return answer.status === 204 ? null : JSON.parse(await answer.text(), exactly);
  let reason = `${answer.status} ${answer.statusText}`;
  try {
    const { detail } = await answer.json();
    if (detail) reason = typeof detail === "string" ? detail : JSON.stringify(detail);
  } catch {
    // no JSON: the status line has to do
  }
  const error = new Error(answer.status === 401 ? "You are not logged in, or no longer: reload Airflow." : reason);
  error.status = answer.status;
  throw error;
}

/** Go to a page of Airflow itself. The frame may not navigate its parent, a link of the parent's own may. */
function airflowLink(path, properties, ...children) {
  const address = new URL(path, AIRFLOW).href;
  const go = (event) => {
    if (!inAirflow || event.ctrlKey || event.metaKey || event.shiftKey) return;
    event.preventDefault();
    const link = window.parent.document.createElement("a");
    link.href = address;
    link.click();
  };
  return h("a", { href: address, onclick: go, ...properties }, ...children);
}

// Airflow keeps its color mode as a class of its root element, and in the browser's storage.
function followTheme() {
  const root = document.documentElement;
  const parentRoot = inAirflow ? window.parent.document.documentElement : null;
  const system = window.matchMedia("(prefers-color-scheme: dark)");
  const tokens = {
    "--bg": "bg", "--muted": "bg-muted", "--fg": "fg", "--fg-muted": "fg-muted",
    "--border": "border", "--border-strong": "border-emphasized",
  };
  const apply = () => {
    let dark = system.matches;
    const chosen = localStorage.getItem("theme");
    if (chosen === "dark" || chosen === "light") dark = chosen === "dark";
    if (parentRoot?.classList.contains("dark")) dark = true;
    else if (parentRoot?.classList.contains("light")) dark = false;
    root.dataset.theme = dark ? "dark" : "light";
    if (!parentRoot) return;
    const theirs = getComputedStyle(parentRoot);
    for (const [ours, name] of Object.entries(tokens)) {
      const value = theirs.getPropertyValue(`--chakra-colors-${name}`).trim();
      if (value) root.style.setProperty(ours, value);
    }
  };
  apply();
  system.addEventListener("change", apply);
  window.addEventListener("storage", apply);
  if (parentRoot) new MutationObserver(apply).observe(parentRoot, { attributeFilter: ["class"] });
}

// ---- moments

const zone = (() => {
  try {
    const chosen = JSON.parse(localStorage.getItem("timezone"));
    new Intl.DateTimeFormat("en", { timeZone: chosen });
    return chosen ?? undefined;
  } catch {
    return undefined;
  }
})();
const clock = new Intl.DateTimeFormat("sv-SE", {
  timeZone: zone, year: "numeric", month: "2-digit", day: "2-digit", hour: "2-digit", minute: "2-digit", second: "2-digit",
});

function duration(seconds) {
  const s = Math.max(0, seconds);
  if (s < 1) return `${s.toFixed(1)} s`;
  if (s < 60) return `${Math.floor(s)} s`;
  if (s < 3600) return `${Math.floor(s / 60)} min ${Math.floor(s % 60)} s`;
  if (s < 86400) return `${Math.floor(s / 3600)} h ${Math.floor((s % 3600) / 60)} min`;
  return `${Math.floor(s / 86400)} d ${Math.floor((s % 86400) / 3600)} h`;
}

function moment(text) {
  return text ? clock.format(new Date(text)) : "";
}

/** A moment as how long ago it is, or how far ahead, with the moment itself on hovering. */
function relative(text, none = "–") {
  if (!text) return h("span", { class: "quiet" }, none);
  const seconds = (Date.now() - new Date(text)) / 1000;
  return h("time", { datetime: text, title: moment(text) }, seconds >= 0 ? `${duration(seconds)} ago` : `in ${duration(-seconds)}`);
}

/** Let the times that are shown go on, where nothing else has changed. */
function tick() {
  for (const element of main.querySelectorAll("time")) element.replaceWith(relative(element.dateTime));
}

// ---- parts

const WORDS = { up_for_retry: "up for retry", up_for_reschedule: "up for reschedule", upstream_failed: "upstream failed" };

function badge(wait) {
  const stuck = wait.stage === "recorded";
  const state = wait.state ?? "no state";
  const title = stuck ? "The event is recorded, and not acknowledged at its source" : null;
  return h("span", { class: `badge is-${stuck ? "recorded" : state}`, title }, stuck ? `recorded · ${WORDS[state] ?? state}` : WORDS[state] ?? state);
}

function address(wait) {
  const query = new URLSearchParams({ dag_id: wait.dag_id, run_id: wait.run_id, task_id: wait.task_id, map_index: wait.map_index });
  return `?${query}`;
}

function path(wait, ...rest) {
  return [wait.dag_id, wait.run_id, wait.task_id, wait.map_index, ...rest].map(encodeURIComponent).join("/");
}

function taskName(wait) {
  return wait.map_index >= 0 ? `${wait.task_id} [${wait.map_index}]` : wait.task_id;
}

function taskPage(wait) {
  const mapped = wait.map_index >= 0 ? `/mapped/${wait.map_index}` : "";
  return `dags/${encodeURIComponent(wait.dag_id)}/runs/${encodeURIComponent(wait.run_id)}/tasks/${encodeURIComponent(wait.task_id)}${mapped}`;
}

function notice(error) {
  return h("div", { class: "notice error", role: "alert" }, error.message);
}

function empty(title, text) {
  return h("div", { class: "empty" }, h("strong", {}, title), text);
}

/** Replace what is shown, and keep the focus and the selection where the user has them. */
function show(...content) {
  const focus = document.activeElement?.id;
  const range = focus && document.activeElement.tagName === "INPUT" ? document.activeElement.selectionStart : null;
  main.replaceChildren(...content.filter(Boolean));
  main.setAttribute("aria-busy", "false");
  const element = focus && document.getElementById(focus);
  if (element) {
    element.focus({ preventScroll: true });
    if (range !== null) element.setSelectionRange(range, range);
  }
}

/** Look now and again, while somebody looks at the page and no question is open. */
function keepLooking(look) {
  let timer = null;
  const next = async () => {
    clearTimeout(timer);
    if (!document.hidden && !document.querySelector("dialog[open]")) await look();
    timer = setTimeout(next, PAUSE);
  };
  document.addEventListener("visibilitychange", () => document.hidden || next());
  next();
  return next;
}

/** How far a task has come that waits for many events; null for others. */
function arrived(wait) {
  if (wait.arrived === null) return null;
  const of = wait.wanted === null ? "" : ` of ${wait.wanted.toLocaleString("en")}`;
  return h("div", { class: "quiet arrived" }, `${wait.arrived.toLocaleString("en")}${of} arrived`);
}

const LONG_WITHOUT = 60_000; // milliseconds that a wait may be without a triggerer before that is marked

function sharing(wait) {
  const now = wait.shared_by === null ? "" : `: it polls for ${wait.shared_by.toLocaleString("en")} now`;
  return `It shares the trigger that polls for it with other waits of its kind${now}`;
}

/** Where a wait's trigger is; null for a wait that has none. */
function triggerer(wait) {
  if (wait.triggerer) {
    return h("span", { class: wait.triggerer.alive ? null : "late", title: `job ${wait.triggerer.id}` }, wait.triggerer.hostname,
      wait.triggerer.alive ? null : h("small", {}, "no heartbeat"),
      wait.hosted ? h("small", { title: sharing(wait) }, "hosted") : null,
      wait.trouble ? h("small", { class: "late", title: wait.trouble }, "source unreachable") : null);
  }
  if (wait.parked) {
    return h("span", { class: "quiet", title: "No polling needed: the API server ends this wait" }, "parked");
  }
  if (wait.state !== "deferred") return null;
  return h("span", { class: Date.now() - new Date(wait.since) > LONG_WITHOUT ? "late" : "quiet" }, "not assigned");
}

const DAG_STATES = {
  paused: ["The DAG is paused", "The wait still receives its event, but workers and downstream tasks do not start until the DAG is unpaused."],
  gone: ["DAG missing", "The DAG is not in its file any more, or the file is missing: the wait still receives its event, but workers and downstream tasks cannot start until the DAG is back."],
};

// ---- the list

const COLUMNS = {
  wait: { title: "Wait", order: "dag_id", cell: (wait) => h("td", { class: "name" },
    h("a", { class: "cut", id: address(wait), href: address(wait), title: `${wait.dag_id} · ${taskName(wait)}` }, `${wait.dag_id} · ${taskName(wait)}`),
    h("span", { class: "cut", title: wait.run_id }, wait.run_id),
    wait.dag_state && h("span", { class: "cut warn", title: DAG_STATES[wait.dag_state][1] }, DAG_STATES[wait.dag_state][0])) },
  call: { title: "Waits for", order: "listener", cell: (wait) => h("td", { class: "call" },
    h("code", { title: wait.call ?? "" }, wait.call ?? wait.listener ?? "–"), arrived(wait)) },
  state: { title: "State", order: "state", cell: (wait) => h("td", {}, badge(wait)) },
  since: { title: "Since", order: "since", cell: (wait) => h("td", { class: "time" }, relative(wait.since)) },
  deadline: { title: "Deadline", order: "deadline", cell: (wait) => h("td", { class: "time" }, relative(wait.deadline, "none")) },
  where: { title: "Triggerer", order: "triggerer", cell: (wait) => h("td", {}, triggerer(wait) ?? h("span", { class: "quiet" }, "–")) },
  life: { title: "Last heartbeat", order: "sign_of_life", cell: (wait) => h("td", { class: `time ${wait.triggerer && !wait.triggerer.alive ? "late" : ""}` }, relative(wait.sign_of_life)) },
  recorded: { title: "Recorded", cell: (wait) => h("td", { class: "time" }, relative(wait.recorded)) },
  ended: { title: "Ended", order: "ended", cell: (wait) => h("td", { class: "time" }, relative(wait.ended)) },
  delivery: { title: "Record to delivery", cell: (wait) => h("td", { class: "time" },
    wait.seconds_to_delivery === null ? h("span", { class: "quiet" }, "–") : duration(wait.seconds_to_delivery)) },
};
const SHOWN = {
  recorded: ["wait", "call", "state", "recorded", "since", "where"],
  open: ["wait", "call", "state", "since", "deadline", "where", "life"],
  ended: ["wait", "call", "state", "since", "recorded", "ended", "delivery"],
};

function table(stage, waits, wanted, sort) {
  const columns = SHOWN[stage].map((name) => COLUMNS[name]);
  const head = columns.map((column) => {
    if (!sort || !column.order) return h("th", { scope: "col" }, column.title);
    const sorted = wanted.order === column.order;
    const arrow = sorted ? (wanted.descending ? " ↓" : " ↑") : "";
    return h("th", { scope: "col", "aria-sort": sorted ? (wanted.descending ? "descending" : "ascending") : null },
      h("button", { class: "plain", id: `sort-${column.order}`, onclick: () => sort(column.order) }, column.title + arrow));
  });
  const body = waits.map((wait) => h("tr", {}, columns.map((column) => column.cell(wait))));
  return grid(head, body);
}

function grid(head, body) {
  return h("div", { class: "scroll" }, h("table", {}, h("thead", {}, h("tr", {}, head)), h("tbody", {}, body)));
}

// ---- what starts runs

const START_STATES = {
  open: ["success", "The next event starts a run"],
  full: ["deferred", "Limit of active runs reached: events wait at their source"],
  paused: ["none", "The DAG is paused: events wait at their source"],
  broken: ["failed", "The DAG's file has import errors: events wait at their source"],
  failing: ["failed", null],
  "no trigger": ["up_for_retry", "No trigger yet: Airflow creates it when it parses the DAG's file the next time"],
  "no triggerer": ["failed", "No running triggerer has this trigger"],
};
const START_COLUMNS = ["DAG", "Starts on", "State", "Active runs", "Lag", "Last event", "Triggerer"];

function startRow(start) {
  const [look, title] = START_STATES[start.state] ?? ["none", null];
  const dag = `dags/${encodeURIComponent(start.dag_id)}`;
  return h("tr", {},
    h("td", { class: "name" }, airflowLink(dag, { class: "cut", id: `${dag} ${start.asset}`, title: start.dag_id }, start.dag_id)),
    h("td", { class: "call" }, h("code", { title: start.asset }, start.asset)),
    h("td", {}, h("span", { class: `badge is-${look}`, title: start.state === "failing" ? start.trouble : title }, start.state)),
    h("td", {}, `${start.active.toLocaleString("en")} of ${start.up_to.toLocaleString("en")}`),
    h("td", { title: "Messages at the source that nobody has acknowledged" }, start.lag?.toLocaleString("en") ?? h("span", { class: "quiet" }, "–")),
    h("td", { class: "time" }, relative(start.last_event, "none"),
      start.last_run && airflowLink(`${dag}/runs/${encodeURIComponent(start.last_run)}`, { class: "cut quiet", id: `${dag} ${start.asset} last`, title: start.last_run }, start.last_run)),
    h("td", {}, triggerer({ ...start, state: null }) ?? h("span", { class: "quiet" }, "–")));
}

function startTable(starts) {
  return grid(START_COLUMNS.map((title) => h("th", { scope: "col" }, title)), starts.map(startRow));
}

function list(query) {
  const wanted = {
    stage: ["ended", "starts"].includes(query.get("stage")) ? query.get("stage") : "open",
    text: query.get("text") ?? "",
    order: query.get("order") ?? "",
    descending: query.get("descending") === "true",
    offset: Number(query.get("offset")) || 0,
  };
  const ask = (stage, more) => call(new URL(`waits?${new URLSearchParams({ stage, ...(wanted.text && { text: wanted.text }), ...more })}`, API));
  let asked = 0;

  const search = h("input", { type: "search", id: "search", placeholder: "DAG, run, task or listener", "aria-label": "Search", value: wanted.text });
  let typing = null;
  search.addEventListener("input", () => {
    clearTimeout(typing);
    typing = setTimeout(() => change({ text: search.value.trim(), offset: 0 }), 250);
  });

  function change(what) {
    Object.assign(wanted, what);
    const kept = Object.entries(wanted).filter(([name, value]) => value && !(name === "stage" && value === "open"));
    history.replaceState(null, "", kept.length ? `?${new URLSearchParams(kept)}` : location.pathname);
    look();
  }

  function sort(order) {
    change({ order, descending: wanted.order === order ? !wanted.descending : false, offset: 0 });
  }

  async function look() {
    const mine = ++asked;
    const more = { limit: LIMIT, offset: wanted.offset, ...(wanted.order && { order: wanted.order, descending: wanted.descending }) };
    let page, stuck, error;
    try {
      const asked = wanted.stage === "starts" ? call(new URL("starts", API)) : ask(wanted.stage, more);
      [page, stuck] = await Promise.all([asked, ask("recorded", { limit: 20 })]);
    } catch (problem) {
      error = problem;
    }
    if (mine !== asked) return; // a later question is on its way
    const header = h("div", { class: "row" }, h("h1", {}, "Waits"), h("span", { class: "grow" }), search);
    show(h("div", { class: "stack" }, header, ...(error ? [tabs(null), notice(error)] : view(page, stuck))));
  }

  function tabs(open) {
    const tab = (stage, title, count) => h("button", {
      role: "tab", id: `tab-${stage}`, "aria-selected": String(wanted.stage === stage),
      onclick: () => change({ stage, order: "", descending: false, offset: 0 }),
    }, title, count === null ? null : h("span", { class: "count" }, count.toLocaleString("en")));
    return h("div", { class: "tabs", role: "tablist" }, tab("open", "Open", open), tab("ended", "Ended", null), tab("starts", "Starts runs", null));
  }

  function view(page, stuck) {
    const starts = wanted.stage === "starts" ? page.filter(({ dag_id, asset }) => `${dag_id} ${asset}`.toLowerCase().includes(wanted.text.toLowerCase())) : [];
    const some = starts.length > 0 || page.waits?.length > 0;
    const stages = { open: ["No open waits", "No task of a DAG that you may see waits for an event."], ended: ["Nothing has ended yet", "Waits that succeeded, failed or were skipped appear here."], starts: ["No DAG is started by events", "No DAG that you may see has a schedule of start_on."] };
    const none = wanted.text && wanted.stage === "starts" ? ["Nothing matches", `No DAG and no listener that starts runs has “${wanted.text}” in its name.`]
      : wanted.text ? ["Nothing matches", `No ${wanted.stage} wait has “${wanted.text}” in its DAG, run, task or listener.`] : stages[wanted.stage];
    return [
      stuck.waits.length > 0 && h("section", { class: "stuck", "aria-label": "Recorded, not committed" },
        h("header", {}, h("h2", {}, "Recorded, not committed", h("span", { class: "count" }, stuck.total.toLocaleString("en"))),
          h("p", { class: "quiet" }, "The event is safe in Airflow's database; it is not acknowledged at its source yet. If one stays here, its log says why.")),
        table("recorded", stuck.waits, wanted),
        stuck.more && h("p", { class: "quiet body" }, "These are the first 20; search to see others.")),
      tabs(wanted.stage === "open" ? page.total : null),
      !some ? empty(...none) : wanted.stage === "starts" ? startTable(starts) : table(wanted.stage, page.waits, wanted, sort),
      wanted.stage !== "starts" && (some || wanted.offset > 0) && pager(page),
    ].filter(Boolean);
  }

  function pager(page) {
    const first = wanted.offset + 1, last = wanted.offset + page.waits.length;
    const of = page.total === null ? "" : ` of ${page.total.toLocaleString("en")}`;
    return h("div", { class: "row" },
      h("span", { class: "quiet", id: "range" }, page.waits.length ? `${first.toLocaleString("en")}–${last.toLocaleString("en")}${of}` : "No more"),
      h("span", { class: "grow" }),
      h("button", { id: "previous", disabled: wanted.offset === 0, onclick: () => change({ offset: Math.max(0, wanted.offset - LIMIT) }) }, "Previous"),
      h("button", { id: "next", disabled: !page.more, onclick: () => change({ offset: wanted.offset + LIMIT }) }, "Next"));
  }

  keepLooking(look);
}

// ---- one wait

function detail(query) {
  const index = Number.parseInt(query.get("map_index"), 10);
  const wait = { dag_id: query.get("dag_id"), run_id: query.get("run_id"), task_id: query.get("task_id"), map_index: Number.isNaN(index) ? -1 : index };
  const isTab = query.has("tab");
  let logs = null, logged = "", shown = "";

  async function look() {
    let answer;
    try {
      answer = await call(new URL(`waits/${path(wait)}`, API));
    } catch (error) {
      const none = error.status === 404;
      shown = "";
      show(h("div", { class: "stack" }, back(), none ? empty("There is no such wait", "The task does not wait for an event, or its run, or its DAG, has been deleted.") : notice(error)));
      return;
    }
    const news = JSON.stringify(answer);
    if (news === shown) tick();
    else show(h("div", { class: "stack" }, ...view(answer)));
    shown = news;
    const { summary } = answer.wait;
    const now = `${summary.try_number} ${summary.state} ${summary.phase}`;
    if (summary.try_number > 0 && (now !== logged || summary.state === "running")) {
      logged = now;
      readLog(summary);
    }
  }

  const back = () => !isTab && h("a", { href: location.pathname, id: "back" }, "← All waits");

  function view({ wait: detail, may_see_event, may_edit }) {
    const { summary, record } = detail;
    return [
      back(),
      h("header", { class: "row" },
        h("div", { class: "grow" },
          h("div", { class: "row" }, isTab ? null : h("h1", {}, `${summary.dag_id} · ${taskName(summary)}`), badge(summary)),
          isTab ? null : h("p", { class: "quiet mono" }, summary.run_id)),
        ...actions(detail, may_edit).filter(Boolean)),
      summary.dag_state && summary.stage !== "ended" && h("div", { class: "notice warn" }, DAG_STATES[summary.dag_state][1]),
      h("section", { class: "card", "aria-label": "Life" }, steps(detail)),
      detail.error && h("section", { class: "card" }, h("header", {}, h("h2", { class: "late" }, "The trigger failed")), h("pre", {}, detail.error)),
      h("div", { class: "cards" }, facts(detail), eventCard(detail, may_see_event)),
      h("div", { class: "cards" }, tries(detail), logCard()),
    ].filter(Boolean);
  }

  function actions(detail, may_edit) {
    const task = isTab ? null : airflowLink(taskPage(detail.summary), { class: "button", id: "task" }, "Task");
    if (!may_edit) return [task];
    const takes = detail.takes_http_events;
    return [
      task,
      takes && h("button", { id: "send", class: "primary", onclick: () => send(detail.summary) }, "Send event…"),
      takes && h("button", { id: "reject", class: "danger", onclick: () => reject(detail.summary) }, "Reject…"),
      !takes && h("button", { id: "forget", class: "danger", disabled: detail.cannot_forget !== null, title: detail.cannot_forget,
        onclick: () => forget(detail.summary) }, "Forget event…"),
    ];
  }

  function steps({ steps, summary }) {
    return h("ol", { class: "steps" }, steps.map((step) => {
      const failed = step.done && step.name.startsWith("Ended") && !["skipped", "success"].includes(summary.state);
      const here = step.name === "Committed" && summary.stage === "recorded";
      const kind = failed ? "bad" : here ? "stuck-here" : step.name === "Waiting" ? "now" : step.done ? "done" : "";
      return h("li", { class: kind }, h("strong", {}, step.name),
        step.at ? h("small", {}, moment(step.at)) : null,
        step.note ? h("small", {}, step.note) : here ? h("small", {}, "not yet") : null);
    }));
  }

  function facts({ summary, arguments: told }) {
    const rows = [
      ["Waits for", summary.call ?? summary.listener ? h("code", {}, summary.call ?? summary.listener) : null],
      ["Arrived", arrived(summary)],
      ["Since", summary.since && [moment(summary.since), " · ", relative(summary.since)]],
      ["Deadline", summary.deadline ? [moment(summary.deadline), " · ", relative(summary.deadline)] : "none"],
      ["Triggerer", triggerer(summary)],
      ["Last heartbeat", summary.sign_of_life && relative(summary.sign_of_life)],
      ["Process", summary.holder && h("code", {}, summary.holder)],
      ["Ends where", told && (told.on_worker_because ? `on a worker, because ${told.on_worker_because}` : `${summary.listener === "HttpListener" ? "with the request" : summary.parked ? "in the API server" : "in the triggerer"}, without a worker`)],
      ["Ended", summary.ended && [moment(summary.ended), " · ", relative(summary.ended)]],
    ].filter(([, value]) => value);
    return h("section", { class: "card" }, h("header", {}, h("h2", {}, "The wait")),
      h("div", { class: "body" }, h("dl", {}, rows.flatMap(([name, value]) => [h("dt", {}, name), h("dd", {}, value)]))));
  }

  function eventCard({ record }, may_see_event) {
    let content;
    if (!record) content = h("div", { class: "body quiet" }, "No event has been recorded.");
    else if (record.phase === "rejected") content = h("div", { class: "body" }, `${record.sent_by} has rejected the wait${record.reason === null ? "." : `: ${record.reason}`}`);
    else if (!may_see_event) content = h("div", { class: "body quiet" }, "You need permission to read this DAG's XComs.");
    else content = h("pre", { id: "event" }, record.preview === null ? JSON.stringify(record.event, null, 2) : `${record.preview}…`);
    const cut = record?.preview && h("span", { class: "quiet" },
      `the first ${record.preview.length.toLocaleString("en")} of ${record.length.toLocaleString("en")} characters`);
    const look = { committed: "success", rejected: "failed" };
    const phase = record && h("span", { class: `badge is-${look[record.phase] ?? "recorded"}` }, record.phase);
    return h("section", { class: "card" }, h("header", {}, h("h2", {}, "The event"), phase, cut), content);
  }

  function tries({ tries }) {
    const rows = tries.filter((one) => one.number > 0).reverse().map((one) => h("tr", {}, h("td", {}, one.number), h("td", {}, badge(one)),
      h("td", { class: "time" }, moment(one.start)), h("td", { class: "time" }, moment(one.end))));
    const head = h("tr", {}, ["Try", "State", "From", "Until"].map((title) => h("th", { scope: "col" }, title)));
    return h("section", { class: "card" }, h("header", {}, h("h2", {}, "Tries")),
      rows.length ? h("table", {}, h("thead", {}, head), h("tbody", {}, rows)) : h("div", { class: "body quiet" }, "Not started yet."));
  }

  function logCard() {
    logs ??= h("div", {}, h("div", { class: "body quiet" }, "…"));
    return h("section", { class: "card log" }, h("header", {}, h("h2", {}, "Last lines of the log")), logs);
  }

  async function readLog(summary) {
    const task = ["dags", wait.dag_id, "dagRuns", wait.run_id, "taskInstances", wait.task_id, "logs", summary.try_number].map(encodeURIComponent).join("/");
    const address = new URL(`api/v2/${task}?map_index=${wait.map_index}&full_content=true`, AIRFLOW);
    try {
      const { content } = await call(address, { headers: { Accept: "application/json" } });
      const lines = (Array.isArray(content) ? content : []).filter((line) => line.event && line.timestamp && !/^::(end)?group::/.test(line.event)).slice(-12);
      logs.replaceChildren(lines.length
        ? h("ol", {}, lines.map((line) => h("li", { class: line.level }, h("span", { class: "quiet mono" }, moment(line.timestamp)), h("span", {}, line.event))))
        : h("div", { class: "body quiet" }, "The log of this try is empty."));
    } catch (error) {
      logs.replaceChildren(h("div", { class: "body quiet" }, `The log cannot be read: ${error.message}`));
    }
  }

  /** Ask before something is done; what it fails with is shown in the question. */
  function ask(id, title, content, button, act) {
    const message = h("div", { role: "alert" });
    const yes = h("button", { id: `${id}-yes`, ...button.properties }, button.text);
    const form = h("form", {}, h("h2", {}, title), ...content, message,
      h("div", { class: "row" }, h("button", { type: "button", id: "cancel", onclick: () => dialog.close() }, "Cancel"), yes));
    const dialog = h("dialog", { id: `${id}-dialog` }, form);
    form.addEventListener("submit", async (event) => {
      event.preventDefault();
      yes.disabled = true;
      try {
        await act();
        dialog.close();
      } catch (error) {
        message.replaceChildren(notice(error));
      }
      yes.disabled = false;
    });
    dialog.addEventListener("close", () => { dialog.remove(); look(); });
    document.body.append(dialog);
    dialog.showModal();
  }

  const httpAddress = (...rest) => {
    const parts = ["dags", wait.dag_id, "runs", wait.run_id, "tasks", wait.task_id, ...rest].map(encodeURIComponent);
    return new URL(`${parts.join("/")}?map_index=${wait.map_index}`, new URL("../", API));
  };
  const post = (address, body, headers = {}) =>
    call(address, { method: "POST", headers: { "Content-Type": "application/json", ...headers }, body });

  function forget(summary) {
    ask("forget", "Forget this event?", [
      h("p", {}, "The record and the task's return value are deleted. When the task is cleared, it waits for another event and does not get this one again."),
      ...(summary.stage === "recorded" ? [h("p", { class: "late" }, "This event is not committed: its source will deliver it again, to this wait or to another.")] : []),
      ...(summary.phase === "committed" ? [h("p", { class: "quiet" }, "It is acknowledged already: an event with the same id will not be delivered again. Send it with a new id.")] : []),
    ], { text: "Forget it", properties: { class: "danger" } }, () => post(new URL(`waits/${path(wait, "forget")}`, API), "{}"));
  }

  function send(summary) {
    // Should no answer come, the same event once more learns what became of the first.
    const keys = new Map();
    const keyOf = (text) => {
      if (!keys.has(text)) keys.set(text, Array.from(crypto.getRandomValues(new Uint32Array(4)), (n) => n.toString(16)).join("-"));
      return keys.get(text);
    };
    const payload = h("textarea", { id: "payload", spellcheck: "false", "aria-label": "The event, as JSON" });
    payload.value = "{}";
    ask("send", "Send an event", [
      h("p", {}, summary.state === "deferred"
        ? "The task ends with it at once, and what comes after it goes on. This cannot be taken back."
        : "It is kept, and the task ends with it when it begins. This cannot be taken back."), payload,
    ], { text: "Send", properties: { class: "primary" } }, () => {
      try {
        JSON.parse(payload.value);
      } catch (error) {
        throw new Error(`This is not valid JSON: ${error.message}`);
      }
      // As it was typed: what is parsed has large integers rounded.
      return post(httpAddress(), payload.value, { "Idempotency-Key": keyOf(payload.value) });
    });
  }

  function reject() {
    const reason = h("textarea", { id: "reason", required: true, maxlength: 2000, "aria-label": "Why" });
    ask("reject", "Reject this wait?", [
      h("p", {}, "The task fails without another try, with this reason in its log. After a clear it waits again."), reason,
    ], { text: "Reject", properties: { class: "danger" } }, () => post(httpAddress("reject"), JSON.stringify({ reason: reason.value })));
  }

  keepLooking(look);
}

followTheme();
const query = new URLSearchParams(location.search);
if (query.has("task_id")) detail(query);
else list(query);
