// Sortable tables: the cells stay the nodes they are, the grid only moves rows.
for (const held of document.querySelectorAll("table.sortable")) {
  new DataTable(held, { paging: false, searching: false, info: false, order: [], autoWidth: false,
    layout: { topStart: null, topEnd: null, bottomStart: null, bottomEnd: null } });
}
document.documentElement.dataset.ready = "true";
