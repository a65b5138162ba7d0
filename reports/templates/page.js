// Filters, sorting and zoom. Without it a page lacks these, and no content.
