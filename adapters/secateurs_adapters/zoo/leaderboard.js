const table = document.getElementById("zoo"), body = table.tBodies[0], heads = [...table.tHead.rows[0].cells];
const words = document.getElementById("words"), status = document.getElementById("status"), told = document.getElementById("told");
const value = (row, column) => row.cells[column].dataset.value ?? row.cells[column].textContent.trim();

function compare(one, other) {
  if (one === "" || other === "") return (one === "") - (other === "");
  return isNaN(one) || isNaN(other) ? one.localeCompare(other, undefined, { numeric: true }) : one - other;
}

heads.forEach((head, column) => head.firstElementChild.addEventListener("click", () => {
  const sign = head.getAttribute("aria-sort") === "ascending" ? -1 : 1;
  heads.forEach(other => other.removeAttribute("aria-sort"));
  head.setAttribute("aria-sort", sign === 1 ? "ascending" : "descending");
  const empty = row => value(row, column) === "";
  const sorted = [...body.rows].sort((one, other) =>
    (empty(one) || empty(other) ? 1 : sign) * compare(value(one, column), value(other, column)));
  body.append(...sorted);
}));

function filter() {
  const wanted = words.value.toLowerCase().split(/\s+/).filter(Boolean);
  let shown = 0;
  for (const row of body.rows) {
    const text = row.textContent.toLowerCase();
    row.hidden = !wanted.every(word => text.includes(word)) || (status.value !== "" && row.dataset.status !== status.value);
    shown += !row.hidden;
  }
  told.textContent = shown + " of " + body.rows.length + " rows";
}

words.addEventListener("input", filter);
status.addEventListener("change", filter);
document.getElementById("filters").hidden = false;
filter();
