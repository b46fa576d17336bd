// Small functions that make elements. Text from the server becomes text nodes and nothing else.

/** Makes an element with properties and children; strings become text. */
export function make(tag, properties = {}, ...children) {
  const element = document.createElement(tag);
  for (const [name, value] of Object.entries(properties)) {
    if (name in element) element[name] = value;
    else element.setAttribute(name, value);
  }
  element.append(...children.map((child) => (child instanceof Node ? child : String(child))));
  return element;
}

/** Makes an element of SVG. */
export function draw(tag, attributes = {}, ...children) {
  const element = document.createElementNS("http://www.w3.org/2000/svg", tag);
  for (const [name, value] of Object.entries(attributes)) element.setAttribute(name, value);
  element.append(...children);
  return element;
}

export const byId = (id) => document.getElementById(id);

/** Sets text only where it differs, so that screen readers hear what is new. */
export function say(element, text, bad = false) {
  if (element.textContent !== text) element.textContent = text;
  element.toggleAttribute("data-bad", bad);
}

/**
 * Fills the rows of a table's body. The first cell of a row is its header; cells are text or nodes.
 *
 * Cells stay where they are and change only where they differ, so that whoever reads them with a
 * screen reader keeps their place.
 */
export function fillRows(body, rows) {
  while (body.rows.length > rows.length) body.deleteRow(-1);
  for (const [place, cells] of rows.entries()) {
    const row = body.rows[place] ?? body.insertRow();
    for (const [column, cell] of cells.entries()) {
      const kept = row.cells[column] ?? row.appendChild(column ? make("td") : make("th", { scope: "row" }));
      if (cell instanceof Node) kept.replaceChildren(cell);
      else say(kept, cell);
    }
  }
}

export function seconds(value) {
  if (value === null || value === undefined) return "–";
  if (value === 0) return "0 s";
  if (value < 0.0995) return `${(value * 1000).toFixed(1)} ms`;
  return value < 1 ? `${(value * 1000).toFixed(0)} ms` : `${value.toFixed(2)} s`;
}

export function count(value) {
  return value === null || value === undefined ? "–" : Math.round(value).toLocaleString("en");
}

export function percent(value) {
  return value === null || value === undefined ? "–" : `${(value * 100).toFixed(0)}%`;
}
