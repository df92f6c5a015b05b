"use strict";
// A page is whole without this: it adds values where one points, sorted tables, and series that come and go.
(() => {
  const data = JSON.parse(document.getElementById("data").textContent);
  document.documentElement.classList.add("js");

  const number = (text) => (text === "–" ? NaN : Number(text.replace("−", "-").replaceAll(",", "")));
  const compare = (a, b) => {
    const [x, y] = [number(a), number(b)];
    return Number.isNaN(x) || Number.isNaN(y) ? a.localeCompare(b) : x - y;
  };
  for (const table of document.querySelectorAll(".sortable table")) {
    const heads = [...table.tHead.rows[0].cells];
    heads.forEach((head, column) => {
      const button = document.createElement("button");
      button.type = "button";
      button.append(...head.childNodes);
      head.append(button);
      button.addEventListener("click", () => {
        const down = head.getAttribute("aria-sort") === "ascending";
        heads.forEach((other) => other.removeAttribute("aria-sort"));
        head.setAttribute("aria-sort", down ? "descending" : "ascending");
        const text = (row) => row.cells[column].textContent;
        const order = (a, b) => (text(a) === "–") - (text(b) === "–") || (down ? -1 : 1) * compare(text(a), text(b));
        table.tBodies[0].append(...[...table.tBodies[0].rows].sort(order));
      });
    });
  }

  for (const figure of document.querySelectorAll("figure[data-points]")) {
    const points = data[figure.dataset.points];
    if (!points.length) continue;
    const [plot, cursor] = [figure.querySelector(".plot"), figure.querySelector(".cursor")];
    const output = figure.querySelector("output");
    const slider = Object.assign(document.createElement("input"), { type: "range", min: 0, max: points.length - 1 });
    slider.setAttribute("aria-label", figure.querySelector("figcaption").textContent);
    output.before(slider);

    const table = document.querySelector(`#${figure.dataset.points} table`);
    const rows = new Map(table ? [...table.tBodies[0].rows].map((row) => [row.cells[0].textContent, row]) : []);
    const show = (place) => {
      const point = points[place];
      slider.value = place;
      slider.setAttribute("aria-valuetext", point.text);
      output.textContent = point.text;
      for (const end of ["x1", "x2"]) cursor.setAttribute(end, `${100 * point.x}%`);
      cursor.removeAttribute("hidden");
      table?.querySelector(".chosen")?.classList.remove("chosen");
      rows.get(point.row)?.classList.add("chosen");
    };
    const reveal = () => rows.get(points[slider.value].row)?.scrollIntoView({ block: "nearest" });
    const point = (event) => {
      const box = plot.getBoundingClientRect();
      const x = (event.clientX - box.left) / box.width;
      const far = points.map((one) => Math.abs(one.x - x));
      show(far.indexOf(Math.min(...far)));
    };
    plot.addEventListener("pointermove", point);
    plot.addEventListener("click", (event) => [point(event), reveal()]);
    slider.addEventListener("input", () => show(Number(slider.value)));
    slider.addEventListener("change", reveal);
    rows.forEach((row, name) =>
      row.addEventListener("click", () => {
        const place = points.findIndex((one) => one.row === name);
        if (place >= 0) show(place);
      }),
    );
    show(figure.dataset.points === "rounds" ? points.length - 1 : 0);

    for (const box of figure.querySelectorAll(".legend input")) {
      box.addEventListener("change", () => {
        for (const one of figure.querySelectorAll(`[data-series="${box.value}"]`)) one.toggleAttribute("hidden", !box.checked);
      });
    }
  }
})();
