"""`make report`: from the JSON files under reports/ to a page, its Markdown twin, and the interview guide."""
