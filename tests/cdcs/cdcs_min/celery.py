"""A Celery app without a broker: a task runs where it is called."""

from celery import Celery

app = Celery("cdcs_min", broker="memory://", backend="cache+memory://")
app.conf.task_always_eager = True
