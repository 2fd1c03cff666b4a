// A table that keeps its rows: only cells whose text changed are touched, and all text goes in as text, never as HTML.

const PAGE = 50;

export function element(name, options = {}, ...children) {
  const made = document.createElement(name);
  for (const [key, value] of Object.entries(options)) {
    if (key === "text") made.textContent = value;
    else if (key === "class") made.className = value;
    else made.setAttribute(key, value);
  }
  made.append(...children);
  return made;
}

/** Columns are {title, value(row), show(value, row), kind, title_of(value)}; rows come from set(), newest order kept. */
export class Table {
  constructor(host, caption, columns, { key, isBad = () => false, sort = null }) {
    this.columns = columns;
    this.key = key;
    this.isBad = isBad;
    this.sort = sort;
    this.rows = [];
    this.shown = new Map();
    this.limit = PAGE;
    this.caption = element("caption", { text: caption });
    this.captionText = caption;
    this.body = element("tbody");
    this.heads = columns.map((column, index) => this.head(column, index));
    const table = element("table", {}, this.caption, element("thead", {}, element("tr", {}, ...this.heads)), this.body);
    this.more = element("button", { type: "button", class: "more", text: "Show more" });
    this.more.addEventListener("click", () => {
      this.limit += 10 * PAGE;
      this.draw();
    });
    const region = element("div", { class: "scroll", tabindex: "0", role: "region", "aria-label": `${caption}, table` }, table);
    host.replaceChildren(region, this.more);
    this.markSort();
  }

  head(column, index) {
    const cell = element("th", { scope: "col", class: column.kind || "" });
    const button = element("button", { type: "button", text: column.title });
    button.addEventListener("click", () => {
      const falling = this.sort && this.sort.index === index ? !this.sort.falling : column.kind === "number";
      this.sort = { index, falling };
      this.markSort();
      this.draw();
    });
    cell.append(button);
    return cell;
  }

  markSort() {
    this.heads.forEach((head, index) => {
      if (this.sort && this.sort.index === index) head.setAttribute("aria-sort", this.sort.falling ? "descending" : "ascending");
      else head.removeAttribute("aria-sort");
    });
  }

  set(rows) {
    this.rows = rows;
    this.draw();
  }

  ordered() {
    if (!this.sort) return this.rows;
    const { value } = this.columns[this.sort.index];
    const sign = this.sort.falling ? -1 : 1;
    const keyed = this.rows.map((row) => [value(row), row]);
    keyed.sort(([a], [b]) => {
      if (a === b) return 0;
      if (a === null || a === undefined) return 1;
      if (b === null || b === undefined) return -1;
      return typeof a === typeof b ? sign * (a < b ? -1 : 1) : typeof a === "number" ? -1 : 1;
    });
    return keyed.map(([, row]) => row);
  }

  draw() {
    const visible = this.ordered().slice(0, this.limit);
    const keys = new Set(visible.map((row) => String(this.key(row))));
    for (const [key, line] of this.shown) {
      if (keys.has(key)) continue;
      line.remove();
      this.shown.delete(key);
    }
    let next = this.body.firstChild;
    for (const row of visible) {
      const line = this.line(row);
      if (line === next) next = next.nextSibling;
      else this.body.insertBefore(line, next);
    }
    const count = visible.length < this.rows.length ? `${visible.length} of ${this.rows.length}` : `${this.rows.length}`;
    write(this.caption, `${this.captionText} (${count})`);
    this.more.hidden = visible.length >= this.rows.length;
  }

  line(row) {
    const key = String(this.key(row));
    let line = this.shown.get(key);
    if (!line) {
      const cells = this.columns.map((column, index) =>
        index === 0 ? element("th", { scope: "row", class: column.kind || "" }) : element("td", { class: column.kind || "" }));
      line = element("tr", { "data-key": key }, ...cells);
      this.shown.set(key, line);
    }
    if (line.row === row) return line;
    line.row = row;
    line.classList.toggle("bad", Boolean(this.isBad(row)));
    this.columns.forEach((column, index) => {
      const value = column.value(row);
      const cell = line.cells[index];
      write(cell, column.show(value, row));
      if (cell.value !== value) {
        cell.value = value;
        if (column.full && value) cell.title = value;
        if (column.paint) column.paint(cell, value);
      }
    });
    return line;
  }
}

export function write(target, text) {
  if (target.textContent !== text) target.textContent = text;
}
