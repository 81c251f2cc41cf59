"""A web application as there are many: notes in a database, through SQLAlchemy, served by several worker processes.
Environment: DATABASE, JOURNAL_MODE."""
import os

from flask import Flask, jsonify, request
from sqlalchemy import Column, Integer, String, create_engine, event, func, select
from sqlalchemy.orm import DeclarativeBase, Session

engine = create_engine("sqlite:///" + os.environ["DATABASE"], connect_args={"timeout": 20})


@event.listens_for(engine, "connect")
def connected(connection, _):
    connection.execute("PRAGMA journal_mode=" + os.environ["JOURNAL_MODE"])


class Base(DeclarativeBase):
    pass


class Note(Base):
    __tablename__ = "notes"
    id = Column(Integer, primary_key=True)
    worker = Column(Integer)
    text = Column(String)


app = Flask(__name__)


@app.post("/notes")
def add():
    with Session(engine) as session:
        note = Note(worker=os.getpid(), text=request.get_data(as_text=True))
        session.add(note)
        session.commit()
        return jsonify(id=note.id, worker=note.worker)


@app.get("/notes")
def count():
    with Session(engine) as session:
        return jsonify(count=session.scalar(select(func.count(Note.id))))
