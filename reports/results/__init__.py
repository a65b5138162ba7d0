"""The results database: schema, migrations, connection, baselines, history, merging, retention, export."""
